"""The truth, in plain torch: a product, and what follows it as kernels of their own."""

from __future__ import annotations

import torch
from torch.nn import functional

from trl_turbo.kernels.gated.reference import activate


def skinny_gated_reference(x: torch.Tensor, weight: torch.Tensor, activation: str) -> torch.Tensor:
    """See `op.skinny_gated`; rounds as a product that is followed by vLLM's `SiluAndMul`."""
    gate, up = functional.linear(x, weight).chunk(2, -1)
    return activate(gate, activation) * up


def skinny_linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `op.skinny_linear`."""
    return functional.linear(x, weight, bias)
