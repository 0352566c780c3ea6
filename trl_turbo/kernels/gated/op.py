"""`gated` with gradients, and its two passes without autograd for those that keep less."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from trl_turbo.kernels.autograd import once_differentiable
from trl_turbo.kernels.rows import takes

from . import reference

#: torch's `silu`, `gelu(approximate="none")` and `gelu(approximate="tanh")`.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, in float32 (float64 for float64) and rounded once; arXiv:2002.05202.

    For backward gate and up are kept, and nothing else. A second derivative raises.

    Args:
        gate: [..., I], any floating dtype and strides.
        up: [..., I].
        activation: One of `ACTIVATIONS`.

    Returns:
        [..., I], in what the two dtypes promote to.

    Raises:
        ValueError: Shapes, devices or an activation that do not fit.
    """
    _check(gate, up, activation)
    if torch.compiler.is_compiling():  # which fuses this, and chooses itself what to keep
        return reference.gated_reference(gate, up, activation)
    return _Gated.apply(gate, up, activation)


def gated_forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """`gated` without autograd: h [..., I]."""
    _check(gate, up, activation)
    with torch.no_grad():
        return _passes(gate, up).forward(gate, up, activation)


def gated_backward(
    grad_h: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    *,
    with_h: bool = True,
    in_place: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The way back, without autograd: h again, and the gradients of gate and up, in one pass.

    Args:
        grad_h: [..., I].
        gate: [..., I].
        up: [..., I].
        activation: One of `ACTIVATIONS`.
        with_h: Whether h is wanted; else it is `None`, and not written.
        in_place: Whether to write the gradients over gate and up, which then are what is returned. They must not
            overlap, and nobody may need them after.

    Returns:
        `(h, grad_gate, grad_up)`, each [..., I].

    Raises:
        ValueError: Shapes, devices or an activation that do not fit.
    """
    _check(gate, up, activation)
    if grad_h.shape != gate.shape:
        raise ValueError(f"grad_h is {list(grad_h.shape)} and gate {list(gate.shape)}; they must have one shape")
    with torch.no_grad():
        return _passes(gate, up, grad_h).backward(grad_h, gate, up, activation, with_h=with_h, in_place=in_place)


def _check(gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"There is no activation {activation!r}; name one of {', '.join(ACTIVATIONS)}.")
    if gate.shape != up.shape or gate.device != up.device:
        raise ValueError(
            f"gate is {list(gate.shape)} on {gate.device} and up {list(up.shape)} on {up.device}; they must have one "
            "shape [..., I] and one device"
        )


def _passes(gate: torch.Tensor, up: torch.Tensor, *others: torch.Tensor) -> ModuleType:
    """Who makes the passes over these: the kernels, or plain torch."""
    if takes(gate, up, *others) and gate.dtype == up.dtype:
        try:
            from . import passes
        except ImportError:  # torch builds without Triton (Windows)
            return reference
        return passes
    return reference


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _passes(gate, up).forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        passes = _passes(gate, up, grad_h)
        _, grad_gate, grad_up = passes.backward(grad_h, gate, up, ctx.activation, with_h=False)
        return grad_gate, grad_up, None
