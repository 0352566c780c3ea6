"""The truth in plain torch, and the same two passes that the kernels make, for what the kernels do not take."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

_CUBIC = 0.044715


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of gate [...]."""
    if activation == "silu":
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def gated_reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, gate and up [..., I]; differentiable by autograd, and rounds as transformers' MLPs do."""
    return activate(gate, activation) * up


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up [..., I], rounded once."""
    wide = _wide(gate, up)
    return (activate(gate.to(wide), activation) * up.to(wide)).to(torch.promote_types(gate.dtype, up.dtype))


def backward(
    grad_h: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    *,
    with_h: bool = True,
    in_place: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """See `op.gated_backward`."""
    wide = _wide(gate, up)
    x, other, grad = gate.to(wide), up.to(wide), grad_h.to(wide)
    act, slope = activate(x, activation), _slope(x, activation)
    h = (act * other).to(torch.promote_types(gate.dtype, up.dtype)) if with_h else None
    grad_gate, grad_up = (grad * other * slope).to(gate.dtype), (grad * act).to(up.dtype)
    if in_place:
        return h, gate.copy_(grad_gate), up.copy_(grad_up)
    return h, grad_gate, grad_up


def _wide(gate: torch.Tensor, up: torch.Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(gate.dtype, up.dtype), torch.float32)


def _slope(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation's derivative at x [...]."""
    if activation == "silu":
        s = torch.sigmoid(x)
        return s + x * s * torch.sigmoid(-x)
    if activation == "gelu":
        share = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return share + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    # 0.5 * (1 + tanh(t / 2)) is the sigmoid of t
    t = 2 * math.sqrt(2 / math.pi) * (x + _CUBIC * x * x * x)
    s = torch.sigmoid(t)
    return s + x * s * torch.sigmoid(-t) * (2 * math.sqrt(2 / math.pi)) * (1 + 3 * _CUBIC * x * x)
