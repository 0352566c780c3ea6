"""One linear with one adapter, the commonest form, as an autograd function of its own, or as none.

What `products` computes, with the same products in the same order, but without lists, slices and the questions that
only several linears, several adapters, dropout or several dtypes ask: for a few thousand tokens the device waits for
the host, which spends most of its time on those. Where a dense product is that short, a backward in Python takes the
host longer than all that it saves the device, and the products are torch's own to differentiate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from trl_turbo.kernels.autograd import once_differentiable

from .base import Dense
from .products import scaled, summed
from .spec import Linears, check_unchanged, plainly, rows_of, shaped, to

#: Multiply-adds of the base's product up to which the device is done before the host is: 0.25 ms of an H200, where
#: forward and backward through Python took PEFT's time and more (0.8 to 1.2 of it).
FEW = 70_000_000_000


def is_short(x: torch.Tensor, linears: Linears) -> bool:
    """Whether `in_torch` takes x [..., in] on its device less time than `Single`."""
    base = linears.projections[0].base
    if not (x.is_cuda and isinstance(base, Dense) and base.weight.dtype == base.dtype):
        return False
    return x.numel() * base.shape[0] <= FEW


def in_torch(x: torch.Tensor, linears: Linears) -> torch.Tensor:
    """As `Single`, in operations that torch differentiates: it keeps x and `low` as well, and the adapters' casts."""
    kind = x.device.type
    # Autocast to what all is in already changes nothing, and turning it off takes the host as long as a product
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != linears.compute:
        with plainly(x.device):
            return _in_torch(x, linears)
    return _in_torch(x, linears)


def _in_torch(x: torch.Tensor, linears: Linears) -> torch.Tensor:
    ((lora_A, lora_B, scaling, _),) = linears.adapters
    compute, rows = linears.compute, rows_of(x)
    y = linears.projections[0].base.product(rows, training=True)
    low = functional.linear(rows, to(lora_A, compute))
    return shaped(torch.addmm(y, low, to(lora_B, compute).t(), alpha=scaling), x)


class Single(torch.autograd.Function):
    """Keeps x and `low` [N, r]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linears: Linears, lora_A: torch.Tensor, lora_B: torch.Tensor) -> Any:
        """x [..., in] in `compute`, to [..., out]."""
        compute, rows = linears.compute, rows_of(x)
        with plainly(x.device):
            y = linears.projections[0].base.product(rows, training=True)
            low = scaled(rows, to(lora_A, compute).t(), linears.adapters[0].scaling)
            y.addmm_(low, to(lora_B, compute).t())
        _, _, of_a, of_b = ctx.needs_input_grad
        ctx.save_for_backward(x if of_a else None, low if of_b else None)
        ctx.linears, ctx.versions, ctx.shape = linears, linears.versions(), x.shape
        return shaped(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Gradients of x, lora_A and lora_B."""
        linears, (of_x, _, of_a, of_b) = ctx.linears, ctx.needs_input_grad
        x, low = ctx.saved_tensors
        check_unchanged(linears, ctx.versions)
        ((lora_A, lora_B, scaling, _),) = linears.adapters
        compute, grad = linears.compute, rows_of(grad)
        wide = not linears.rounded
        grad_x = grad_a = grad_b = None
        with plainly(grad.device):
            if of_x or of_a:
                high = scaled(grad, to(lora_B, compute), scaling)
                if of_x:
                    grad_x = linears.projections[0].base.add_gradient(grad, torch.mm(high, to(lora_A, compute)))
                    grad_x = grad_x if len(ctx.shape) == 2 else grad_x.view(ctx.shape)
                if of_a:
                    grad_a = to(summed(high.t(), rows_of(x), wide=wide), lora_A.dtype)
            if of_b:
                grad_b = to(summed(grad.t(), low, wide=wide), lora_B.dtype)
        return grad_x, None, grad_a, grad_b
