"""Autograd functions over `products`: linears of one input, and the gated MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trl_turbo.kernels.gated import gated_backward, gated_forward

from . import products
from .spec import Projection, Projections, adapters_of, check, versions


def lora_linear(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """One linear with its adapters: x @ W.T + bias + sum of scaling * dropout(x) @ lora_A.T @ lora_B.T.

    Keeps x as it is and dropout(x) @ lora_A.T [N, r] for backward; a frozen base gets no gradient. LoRA:
    https://arxiv.org/abs/2106.09685

    Args:
        x: [..., in].
        projection: The frozen linear and its adapters.

    Returns:
        [..., out] in `projection.result`.

    Raises:
        ValueError: Shapes do not fit.
        RuntimeError: In backward, where a weight was changed in place since forward, or in a second derivative.
    """
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
    check(x, projections)
    tensors = _tensors(projections)
    if _has_gradient(x, tensors):
        return _Linears.apply(x, projections, *tensors)
    with _plainly(x.device):
        return tuple(_shaped(y, x) for y in products.forward(_rows(x), projections, training=False)[0])


def lora_mlp(x: torch.Tensor, gate: Projection, up: Projection, down: Projection, activation: str) -> torch.Tensor:
    """The gated MLP, down(activation(gate(x)) * up(x)), in one function.

    Keeps x, gate(x) and up(x) for backward, and a few columns [N, r] of each adapter; the product of both halves is
    made again. SwiGLU and GEGLU: https://arxiv.org/abs/2002.05202

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
    check(x, (gate, up))
    if gate.result != up.result:
        raise ValueError(f"The halves of a gated MLP have one dtype, and these have {gate.result} and {up.result}.")
    projections = (gate, up, down)
    tensors = _tensors(projections)
    if _has_gradient(x, tensors):
        return _Mlp.apply(x, projections, activation, *tensors)
    with _plainly(x.device):
        return _shaped(_mlp(_rows(x), projections, activation, training=False)[0], x)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, projections: Projections, *tensors: torch.Tensor) -> Any:  # noqa: ARG004
        with _plainly(x.device):
            outputs, low, ctx.states = products.forward(_rows(x), projections, training=True)
        needs = ctx.needs_input_grad[2:]
        ctx.save_for_backward(x if any(needs[::2]) else None, low if any(needs[1::2]) else None)
        ctx.projections, ctx.versions, ctx.shape, ctx.dtype = projections, versions(projections), x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return tuple(_shaped(y, x) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        projections = ctx.projections
        needs = ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return (None,) * len(needs)
        x, low = ctx.saved_tensors
        _check_unchanged(ctx)
        device = next(grad.device for grad in grads if grad is not None)
        with _plainly(device):
            flat = [None if grad is None else _rows(grad) for grad in grads]
            of_x, high = products.input_gradient(ctx.dtype, projections, flat, ctx.states, wanted=needs[0])
            rows = None if x is None else _rows(x)
            rest = products.adapter_gradients(rows, projections, flat, low, high, ctx.states, needs[2:])
        return (None if of_x is None else of_x.view(ctx.shape)), None, *rest


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        projections: Projections,
        activation: str,
        *tensors: torch.Tensor,  # noqa: ARG004
    ) -> Any:
        with _plainly(x.device):
            y, saved, ctx.states = _mlp(_rows(x), projections, activation, training=True)
        ctx.save_for_backward(x, *saved)
        ctx.projections, ctx.versions, ctx.activation = projections, versions(projections), activation
        return _shaped(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, gate, up, low, low_down = ctx.saved_tensors
        _check_unchanged(ctx)
        halves, down = ctx.projections[:2], ctx.projections[2:]
        states, states_down = ctx.states
        of_halves = 2 * len(adapters_of(halves))
        needs, rows = ctx.needs_input_grad, _rows(x)
        wanted, wanted_down = needs[3 : 3 + of_halves], needs[3 + of_halves :]
        with _plainly(x.device):
            grad_rows = [_rows(grad)]
            of_h, high_down = products.input_gradient(gate.dtype, down, grad_rows, states_down, wanted=True)
            assert of_h is not None
            h, of_gate, of_up = gated_backward(of_h, gate, up, ctx.activation)
            del of_h
            rest_down = products.adapter_gradients(h, down, grad_rows, low_down, high_down, states_down, wanted_down)
            del h
            grads = [of_gate, of_up]
            of_x, high = products.input_gradient(x.dtype, halves, grads, states, wanted=needs[0])
            rest = products.adapter_gradients(rows, halves, grads, low, high, states, wanted)
        return (None if of_x is None else of_x.view(x.shape)), None, None, *rest, *rest_down


def _mlp(x: torch.Tensor, projections: Projections, activation: str, *, training: bool) -> Any:
    (gate, up), low, states = products.forward(x, projections[:2], training=training)
    h = gated_forward(gate, up, activation)
    (y,), low_down, states_down = products.forward(h, projections[2:], training=training)
    return y, (gate, up, low, low_down), (states, states_down)


def _tensors(projections: Projections) -> list[torch.Tensor]:
    return [tensor for adapter in adapters_of(projections) for tensor in (adapter.lora_A, adapter.lora_B)]


def _has_gradient(x: torch.Tensor, tensors: list[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in tensors))


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y.view(*x.shape[:-1], y.shape[-1])


def _plainly(device: torch.device) -> Any:
    # Every dtype is said; autocast would change those that PEFT does not
    return torch.autocast(device.type, enabled=False)


def _check_unchanged(ctx: Any) -> None:
    if versions(ctx.projections) != ctx.versions:
        raise RuntimeError(
            "A weight of a LoRA layer was changed in place between forward and backward; its gradients would be wrong. "
            "Run backward before the optimizer's step."
        )
