"""What every pass over one call has in common."""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Widest head that the kernels take; narrower ones are padded to a power of two in registers.
WIDEST = 256


class Spec(NamedTuple):
    """The form of an attention.

    Attributes:
        scale: What products of queries and keys are multiplied by.
        window: Query i sees keys j with i - j < window, or `None` for all before it.
        softcap: Scores become softcap * tanh(scores / softcap), or `None`.
        deterministic: Whether gradients must be the same to the bit each time.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    deterministic: bool = False


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
