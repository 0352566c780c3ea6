"""The truth in plain torch, and the same two passes that the kernels make, for what the kernels do not take."""

from __future__ import annotations

import torch

from .spec import Norm, wide


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, norm: Norm) -> torch.Tensor:
    """See `op.rms_norm`; x [..., D], weight [D]; differentiable by autograd, and rounds as transformers' modules do."""
    x_wide = x.to(wide(x.dtype))
    y = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + norm.eps)
    if norm.scale_in_float32:
        return (y * _scale(weight.to(y.dtype), norm)).to(x.dtype)
    return y.to(x.dtype) * _scale(weight, norm)


def forward(x: torch.Tensor, weight: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x [..., D], and 1 / its root mean square [..., 1]."""
    x_wide = x.to(wide(x.dtype))
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + norm.eps)
    y = x_wide * rstd
    if norm.scale_in_float32:
        return (y * _scale(weight.to(y.dtype), norm)).to(x.dtype), rstd
    return y.to(x.dtype) * _scale(weight, norm), rstd


def add_forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of x + residual [..., D], the sum itself, and 1 / its root mean square [..., 1]."""
    total = x + residual
    y, rstd = forward(total, weight, norm)
    return y, total, rstd


def backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    norm: Norm,
    *,
    grad_x: torch.Tensor | None = None,
    needs_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of x [..., D] and weight [D].

    Args:
        grad_y: [..., D].
        x: [..., D].
        weight: [D].
        rstd: [..., 1], from the forward.
        norm: The form.
        grad_x: [..., D], what reaches x by another way, is added.
        needs_weight: Whether the weight's gradient is wanted; else it is `None`.
    """
    y = x.to(rstd.dtype) * rstd
    grad = grad_y.to(rstd.dtype)
    scaled = grad * _scale(weight.to(rstd.dtype), norm)
    new = (scaled - y * (scaled * y).mean(-1, keepdim=True)) * rstd
    if grad_x is not None:
        new = new + grad_x
    grad_weight = None
    if needs_weight:
        factor = y if norm.scale_in_float32 else y.to(x.dtype).to(y.dtype)
        grad_weight = (grad * factor).unsqueeze(0).flatten(0, -2).sum(0, dtype=rstd.dtype).to(weight.dtype)
    return new.to(x.dtype), grad_weight


def _scale(weight: torch.Tensor, norm: Norm) -> torch.Tensor:
    return weight + norm.offset if norm.offset else weight
