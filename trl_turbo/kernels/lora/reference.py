"""Linears with adapters and the gated MLP in plain torch, differentiable by autograd: the truth for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from .spec import Adapter

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapters: Sequence[Adapter]
) -> torch.Tensor:
    """One linear with its adapters.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out] or `None`.
        adapters: Added one after the other.

    Returns:
        [..., out].
    """
    y = functional.linear(x, weight, bias)
    for adapter in adapters:
        dropped = functional.dropout(x, adapter.dropout) if adapter.dropout else x
        y = y + functional.linear(functional.linear(dropped, adapter.lora_A), adapter.lora_B) * adapter.scaling
    return y
