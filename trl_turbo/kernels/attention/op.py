"""`attention`: the public function over its autograd function."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch

from trl_turbo.kernels import get_override
from trl_turbo.kernels.autograd import once_differentiable
from trl_turbo.kernels.rows import takes

from . import batches, dense
from .segments import Segments
from .spec import WIDEST, Spec


def attention(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """Causal attention of each segment to itself and to the whole of its prefix; no score is ever in memory on CUDA.

    softmax(softcap * tanh(scale * q @ k.T / softcap)) @ v, or without a softcap softmax(scale * q @ k.T) @ v, the
    softmax in float32. For backward q, k, v, the result and a float32 [Hq, T] are kept. Under autocast the inputs are
    cast, as torch's own attention casts them. A second derivative raises on CUDA.

    On Hopper, segments of one length without a prefix, a window or a softcap are left to cuDNN, which is faster there;
    a `deterministic` backward is ours. On the CPU, for float64, and in a graph that torch.compile traces, plain torch
    serves, in batches of segments of nearly one length.

    Args:
        q: [T, Hq, D], any floating dtype and strides; D is at most 256.
        k: [T, Hkv, D], in q's dtype; Hkv divides Hq, and query head h reads head h // (Hq // Hkv).
        v: [T, Hkv, D].
        segments: Of T tokens, on q's device.
        scale: Above 0; 1 / sqrt(D) by default.
        window: At least 1: query i sees keys j with i - j < window, in positions, which count the prefix.
        softcap: Above 0, or `None`.
        deterministic: Whether gradients must be the same to the bit each time. The kernels' are either way.

    Returns:
        [T, Hq, D], in the dtype of q (of autocast where that is on).

    Raises:
        ValueError: Shapes, dtypes, devices or numbers that do not fit.

    The forward is FlashAttention-2's (arXiv:2307.08691), with a loop over the prefix's keys before that over its own.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    _check(q, k, v, segments)
    spec = _spec(q, scale, window, softcap, deterministic)
    override = get_override("attention", device, str(q.dtype).removeprefix("torch."))
    if override is not None:
        return override(
            q, k, v, segments, scale=spec.scale, window=window, softcap=softcap, deterministic=deterministic
        )
    passes = None if torch.compiler.is_compiling() else _passes(q, k, v)
    if passes is None:
        with torch.autocast(device, enabled=False):
            return batches.attention_in_batches(q, k, v, segments, spec)
    if dense.serves(q, segments, spec):
        return dense.attend(q, k, v, segments, spec)
    return _Attention.apply(q, k, v, segments, spec, passes)


def _spec(q: torch.Tensor, scale: float | None, window: int | None, softcap: float | None, deterministic: bool) -> Spec:
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else float(scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"The scale must be above 0, and it is {scale}; pass None for 1 / sqrt(D).")
    if window is not None and window < 1:
        raise ValueError(f"The window must be at least 1, the query itself, and it is {window}; pass None for none.")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"The softcap must be above 0, and it is {softcap}; pass None for none.")
    return Spec(
        scale,
        None if window is None else int(window),
        None if softcap is None else float(softcap),
        bool(deterministic),
    )


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> None:
    fits = q.ndim == 3 and k.ndim == 3 and k.shape == v.shape
    if not (fits and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2] and min(*q.shape[1:], k.shape[1]) > 0):
        raise ValueError(
            f"q is {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}; they must be [T, Hq, D] and twice "
            "[T, Hkv, D]"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k {k.shape[1]}; the latter must divide the former")
    if q.shape[2] > WIDEST:
        raise ValueError(f"The heads are {q.shape[2]} wide; this attention takes up to {WIDEST}.")
    if q.shape[0] != segments.total:
        raise ValueError(f"q has {q.shape[0]} tokens and the segments {segments.total}; they must be of one packed row")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; they must have one floating dtype")
    if len({x.device for x in (q, k, v, segments.positions)}) > 1:
        raise ValueError(
            f"q is on {q.device}, k on {k.device}, v on {v.device} and the segments on {segments.device}; build the "
            "segments there, and move all to one device"
        )


def _passes(*tensors: torch.Tensor) -> ModuleType | None:
    """The kernels' passes, or `None` where plain torch serves."""
    if not takes(*tensors):
        return None
    try:
        from . import passes
    except ImportError:  # torch builds without Triton (Windows)
        return None
    return passes


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,  # [T, Hq, D]
        k: torch.Tensor,  # [T, Hkv, D]
        v: torch.Tensor,  # [T, Hkv, D]
        segments: Segments,
        spec: Spec,
        passes: ModuleType,
    ) -> torch.Tensor:
        o, lse = passes.forward(q, k, v, segments, spec)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.segments, ctx.spec, ctx.passes = segments, spec, passes
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: torch.Tensor) -> Any:
        q, k, v, o, lse = ctx.saved_tensors
        grads = ctx.passes.backward(grad_o, q, k, v, o, lse, ctx.segments, ctx.spec)
        return (*grads, None, None, None)
