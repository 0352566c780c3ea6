"""The public functions: linears of one input as an autograd function over `products`, and the gated MLP of `mlp`."""

from __future__ import annotations

from typing import Any

import torch

from trl_turbo.kernels.autograd import once_differentiable

from . import mlp, products, single
from .casts import Cast
from .spec import Linears, Projection, check_unchanged, plainly, rows_of, shaped, together


def lora_linear(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """One linear with its adapters: x @ W.T + bias + sum of scaling * dropout(x) @ lora_A.T @ lora_B.T.

    Keeps x as it is and scaling * dropout(x) @ lora_A.T [N, r] for backward; a frozen base gets no gradient. LoRA:
    https://arxiv.org/abs/2106.09685

    Args:
        x: [..., in].
        projection: The frozen linear and its adapters.

    Returns:
        [..., out] in `projection.result`.

    Raises:
        ValueError: Shapes do not fit.
        RuntimeError: In backward, where a weight was changed in place since forward, or in a second derivative; a
            short product, which torch differentiates, has one.
    """
    linears = together(projection)
    if linears.plain and x.dtype == linears.compute:
        linears.check(x)
        if torch.is_grad_enabled() and (x.requires_grad or linears.have_gradient()):
            if single.is_short(x, linears):
                return single.in_torch(x, linears)
            return single.Single.apply(x, linears, *linears.parameters)
    return lora_qkv(x, projection)[0]


def lora_qkv(x: torch.Tensor, *projections: Projection) -> tuple[torch.Tensor, ...]:
    """Several linears of one input, such as the projections of attention; x is kept once.

    Args:
        x: [..., in].
        projections: Linears with in inputs, whose adapters multiply in one dtype.

    Returns:
        Their outputs, [..., out] each.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        RuntimeError: In backward, where a weight was changed in place since forward, or in a second derivative.
    """
    linears = together(*projections)
    linears.check(x)
    if torch.is_grad_enabled() and (x.requires_grad or linears.have_gradient()):
        return _Linears.apply(x, linears, *linears.parameters)
    with plainly(x.device):
        return tuple(shaped(y, x) for y in products.forward(rows_of(x), linears, Cast(linears), training=False)[0])


def lora_mlp(x: torch.Tensor, gate: Projection, up: Projection, down: Projection, activation: str) -> torch.Tensor:
    """The gated MLP, down(activation(gate(x)) * up(x)), in one function.

    Keeps x, gate(x) and up(x) for backward, and a few columns [N, r] of each adapter; the product of both halves is
    made again. Under gradient checkpointing it keeps x alone, and backward makes the halves again, some thousand rows
    at a time. SwiGLU and GEGLU: https://arxiv.org/abs/2002.05202

    Args:
        x: [..., in].
        gate: in to inner.
        up: in to inner.
        down: inner to out.
        activation: `"silu"`, `"gelu"` or `"gelu_tanh"`, as in `trl_turbo.kernels.gated`.

    Returns:
        [..., out] in `down.result`.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        RuntimeError: In backward, where a weight was changed in place since forward, or in a second derivative.
    """
    if gate.result != up.result:
        raise ValueError(f"The halves of a gated MLP have one dtype, and these have {gate.result} and {up.result}.")
    gated = mlp.Gated(together(gate, up), together(down), activation)
    gated.first.check(x)
    trained = gated.first.have_gradient() or gated.down.have_gradient()
    if not (torch.is_grad_enabled() and (x.requires_grad or trained)):
        with plainly(x.device):
            return shaped(mlp.forward(rows_of(x), gated, training=False), x)
    parameters = (*gated.first.parameters, *gated.down.parameters)
    if mlp.keeps_input(x, gated):
        return mlp.Computes.apply(mlp.KeepsInput.apply(x, gated, *parameters), gated)
    return mlp.KeepsHalves.apply(x, gated, *parameters)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linears: Linears, *parameters: torch.Tensor) -> Any:  # noqa: ARG004
        with plainly(x.device):
            outputs, low, ctx.states = products.forward(rows_of(x), linears, Cast(linears), training=True)
        needs = ctx.needs_input_grad[2:]
        ctx.save_for_backward(x if any(needs[::2]) else None, low if any(needs[1::2]) else None)
        ctx.linears, ctx.versions, ctx.shape, ctx.dtype = linears, linears.versions(), x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return tuple([shaped(y, x) for y in outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        linears = ctx.linears
        needs = ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return (None,) * len(needs)
        x, low = ctx.saved_tensors
        check_unchanged(linears, ctx.versions)
        device = next(grad.device for grad in grads if grad is not None)
        with plainly(device):
            flat = [None if grad is None else rows_of(grad) for grad in grads]
            cast = Cast(linears)
            of_x, high = products.input_gradient(ctx.dtype, linears, flat, ctx.states, cast, wanted=needs[0])
            rows = None if x is None else rows_of(x)
            rest = products.adapter_gradients(rows, linears, flat, low, high, ctx.states, needs[2:])
            rest = products.in_dtypes(rest, linears.parameters)
        return (None if of_x is None else of_x.view(ctx.shape)), None, *rest
