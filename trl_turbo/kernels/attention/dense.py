"""A batch without padding or shared prompts, which is what cuDNN's attention is for: torch's function computes it.

On one H200, in bf16 with heads of 128, cuDNN takes 0.66 to 0.72 of the time of our kernel forward and backward, and
0.57 of that of torch's flash backend. What it has no form for, a window, a softcap, several lengths, is ours.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .segments import Segments
from .spec import Spec

#: cuDNN first; a head that it does not take is left to torch's next.
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
#: What both take, in columns of a head.
WIDEST = 128


def serves(q: torch.Tensor, segments: Segments, spec: Spec) -> bool:
    """Whether these segments are computed here.

    Args:
        q: [T, Hq, D].
        segments: Of T tokens.
        spec: What is asked for.
    """
    if spec.window is not None or spec.softcap is not None or spec.deterministic or not q.is_cuda:
        return False
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] % 8 == 0 and q.shape[2] <= WIDEST
    return fits and segments.even and _has_cudnn(q.device)


def attend(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    segments: Segments,
    spec: Spec,
) -> torch.Tensor:
    """`attention` [T, Hq, D] of segments of one length, differentiable by autograd."""
    count, length = len(segments.lengths), segments.lengths[0]
    query, key, value = (x.reshape(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(BACKENDS, set_priority=True):
        found = scaled_dot_product_attention(query, key, value, is_causal=True, scale=spec.scale, enable_gqa=grouped)
    return found.transpose(1, 2).reshape(q.shape)


@functools.cache
def _has_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's attention is there and was measured on this kind of card."""
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) == (9, 0)
