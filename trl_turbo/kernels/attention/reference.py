"""The truth in plain torch, from the whole [T, T] mask."""

from __future__ import annotations

import torch

from .segments import Segments
from .spec import Spec, wide


def mask_of(segments: Segments, window: int | None) -> torch.Tensor:
    """Which key each query sees, bool [T, T]."""
    count = torch.arange(len(segments.lengths))
    segment = count.repeat_interleave(torch.tensor(segments.lengths, dtype=torch.int64)).to(segments.device)
    prefix = torch.tensor(segments.prefix, dtype=torch.int64, device=segments.device)[segment]
    distance = segments.positions[:, None] - segments.positions[None, :]
    seen = (segment[:, None] == segment[None, :]) & (distance >= 0)
    seen |= prefix[:, None] == segment[None, :]
    return seen if window is None else seen & (distance < window)


def attention_reference(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    segments: Segments,
    spec: Spec,
) -> torch.Tensor:
    """Attention [T, Hq, D] in the dtype of its inputs, the softmax in float32 (float64 for float64) as in eager code.

    Differentiable by autograd. In a low precision it is the yardstick that the kernels' error is measured with.
    """
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return attend(q, k, v, mask_of(segments, spec.window), spec).transpose(0, 1)


def attend(
    q: torch.Tensor,  # [..., Hq, N, D]
    k: torch.Tensor,  # [..., Hkv, M, D]
    v: torch.Tensor,  # [..., Hkv, M, D]
    mask: torch.Tensor,  # [N, M] bool
    spec: Spec,
) -> torch.Tensor:
    """Attention [..., Hq, N, D] of queries to the keys that `mask` lets them see, by plain torch."""
    groups = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(groups, -3) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=wide(q.dtype)).to(q.dtype)
    return weights @ v
