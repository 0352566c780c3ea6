"""`rope`: the public function over its autograd function."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from trl_turbo.kernels.autograd import once_differentiable
from trl_turbo.kernels.rows import takes

from . import reference


def rope(
    q: torch.Tensor,  # [B, H, T, D]
    k: torch.Tensor,  # [B, Hk, T, D]
    cos: torch.Tensor,  # [B or 1, T, R]
    sin: torch.Tensor,  # [B or 1, T, R]
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn each pair of queries' and keys' columns by an angle (arXiv:2104.09864): x * cos + rotate(x) * sin.

    It rounds as transformers' `apply_rotary_pos_emb` does where all dtypes are one, each product and the sum. Where the
    angles' is wider (float32 beside bfloat16), products are in that one and only the result is rounded. For backward
    cos and sin are kept. A second derivative raises.

    Args:
        q: [B, H, T, D], any floating dtype and strides.
        k: [B, Hk, T, D], in q's dtype.
        cos: [B or 1, T, R], R even and at most D, any floating dtype; columns beyond R pass through.
        sin: [B or 1, T, R].
        interleaved: Whether a pair is two columns side by side (Cohere, GLM), not half of R apart (Llama). Either way
            cos and sin have a column for each column of q.

    Returns:
        New q [B, H, T, D] and k [B, Hk, T, D] in q's dtype, dimensions in memory in the same order as those of q and k.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
    """
    _check(q, k, cos, sin)
    if torch.compiler.is_compiling() or cos.requires_grad or sin.requires_grad:
        return tuple(reference.rope_reference(x, cos, sin, interleaved) for x in (q, k))  # type: ignore[return-value]
    return _Rope.apply(q, k, cos, sin, interleaved)


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    fits = q.ndim == 4 and k.ndim == 4 and cos.ndim == 3 and cos.shape == sin.shape
    if fits:
        batch, _, length, width = q.shape
        fits = k.shape[0] == batch and k.shape[2:] == q.shape[2:] and cos.shape[0] in (1, batch)
        fits = fits and cos.shape[1] == length and cos.shape[2] <= width and cos.shape[2] % 2 == 0
    if not fits:
        raise ValueError(
            f"q is {list(q.shape)}, k {list(k.shape)}, cos {list(cos.shape)} and sin {list(sin.shape)}; they must be "
            "[B, H, T, D], [B, Hk, T, D] and twice [B or 1, T, R], R even and at most D"
        )
    if len({x.device for x in (q, k, cos, sin)}) > 1 or q.dtype != k.dtype:
        raise ValueError(
            f"q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}, cos on {cos.device} and sin on {sin.device}; "
            "q and k must have one dtype, and all one device"
        )


def _passes(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> ModuleType:
    """Who turns these: the kernel, or plain torch."""
    tensors = (q, k, cos, sin)
    if takes(*tensors) and cos.dtype == sin.dtype and all(x.stride(-1) == 1 for x in tensors):
        try:
            from . import kernel
        except ImportError:  # torch builds without Triton (Windows)
            return reference
        return kernel
    return reference


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _passes(q, k, cos, sin).turn(q, k, cos, sin, interleaved=interleaved, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        passes = _passes(grad_q, grad_k, cos, sin)
        grad_q, grad_k = passes.turn(grad_q, grad_k, cos, sin, interleaved=ctx.interleaved, back=True)
        return grad_q, grad_k, None, None, None
