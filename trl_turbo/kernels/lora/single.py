"""One linear with one adapter, the commonest form, as an autograd function of its own.

What `products` computes, with the same products in the same order, but without lists, slices and the questions that
only several linears, several adapters, dropout or several dtypes ask: for a few thousand tokens the device waits for
the host, which spends most of its time on those.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_turbo.kernels.autograd import once_differentiable

from .products import scaled, summed
from .spec import Linears, check_unchanged, plainly, rows_of, shaped, to


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
