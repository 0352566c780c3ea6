"""`rms_norm` and `add_rms_norm`: the public functions over their autograd functions."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from trl_turbo.kernels.autograd import once_differentiable
from trl_turbo.kernels.rows import takes

from . import reference
from .spec import WIDEST, Norm


def rms_norm(
    x: torch.Tensor,  # [..., D]
    weight: torch.Tensor,  # [D]
    eps: float,
    *,
    offset: float = 0.0,
    scale_in_float32: bool = False,
) -> torch.Tensor:
    """Divide each row by its root mean square and scale it (arXiv:1910.07467), in float32 (float64 for float64).

    Llama's form rounds first, `(x / rms).to(x.dtype) * weight`; Gemma's last, `(x / rms * (1 + weight)).to(x.dtype)`,
    which is `offset=1.0, scale_in_float32=True`. For backward x and 1 / rms are kept. A second derivative raises.

    Args:
        x: [..., D], any floating dtype and strides.
        weight: [D], any floating dtype.
        eps: Added to the mean square.
        offset: Added to the weight.
        scale_in_float32: Whether to round after scaling instead of before.

    Returns:
        [..., D], laid out as x is; in x's dtype, but in Llama's form in what it and the weight's promote to.

    Raises:
        ValueError: Shapes or devices that do not fit.
    """
    norm = Norm(float(eps), float(offset), bool(scale_in_float32))
    _check(x, weight)
    if torch.compiler.is_compiling():  # which fuses this, and chooses itself what to keep
        return reference.rms_norm_reference(x, weight, norm)
    return _RmsNorm.apply(x, weight, norm)


def add_rms_norm(
    x: torch.Tensor,  # [..., D]
    residual: torch.Tensor,  # [..., D]
    weight: torch.Tensor,  # [D]
    eps: float,
    *,
    offset: float = 0.0,
    scale_in_float32: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm(x + residual)` and `x + residual`, each [..., D], in one pass; see `rms_norm`.

    For backward the sum, which is an output anyway, and 1 / rms are kept.

    Raises:
        ValueError: Shapes or devices that do not fit.
    """
    norm = Norm(float(eps), float(offset), bool(scale_in_float32))
    if x.shape != residual.shape:
        raise ValueError(f"x is {list(x.shape)} and residual {list(residual.shape)}; they must have one shape [..., D]")
    _check(x, weight)
    if torch.compiler.is_compiling():
        total = x + residual
        return reference.rms_norm_reference(total, weight, norm), total
    if x.dtype != residual.dtype:
        total = x + residual
        return rms_norm(total, weight, eps, offset=offset, scale_in_float32=scale_in_float32), total
    return _AddRmsNorm.apply(x, residual, weight, norm)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.ndim == 0 or weight.ndim != 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x is {list(x.shape)} and weight {list(weight.shape)}; they must be [..., D] and [D]")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.device}; move them to one device")


def _passes(*tensors: torch.Tensor) -> ModuleType:
    """Who makes the passes over these: the kernels, or plain torch."""
    if takes(*tensors) and tensors[0].shape[-1] <= WIDEST:
        try:
            from . import passes
        except ImportError:  # torch builds without Triton (Windows)
            return reference
        return passes
    return reference


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, norm: Norm) -> torch.Tensor:
        y, rstd = _passes(x, weight).forward(x, weight, norm)
        ctx.save_for_backward(x, weight, rstd)
        ctx.norm = norm
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = _passes(x, weight, grad_y).backward(
            grad_y, x, weight, rstd, ctx.norm, needs_weight=ctx.needs_input_grad[1]
        )
        return grad_x, grad_weight, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        y, total, rstd = _passes(x, residual, weight).add_forward(x, residual, weight, norm)
        ctx.save_for_backward(total, weight, rstd)
        ctx.norm = norm
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor | None, grad_total: torch.Tensor | None) -> Any:
        total, weight, rstd = ctx.saved_tensors
        if grad_y is None:
            return grad_total, grad_total, None, None
        grad, grad_weight = _passes(total, weight, grad_y).backward(
            grad_y, total, weight, rstd, ctx.norm, grad_x=grad_total, needs_weight=ctx.needs_input_grad[2]
        )
        return grad, grad, grad_weight, None
