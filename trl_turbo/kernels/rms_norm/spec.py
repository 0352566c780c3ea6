"""What the two norms have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Rows that fit a program's registers; plain torch serves wider ones.
WIDEST = 16_384


class Norm(NamedTuple):
    """The form of a norm.

    Attributes:
        eps: Added to the mean square.
        offset: Added to the weight; 1 in Gemma.
        scale_in_float32: Whether the weight multiplies before rounding to x's dtype (Gemma) or after (Llama).
    """

    eps: float
    offset: float = 0.0
    scale_in_float32: bool = False

    def out_dtype(self, x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
        """Dtype of the result for x [..., D] and weight [D]: rounded last to x's, or what the product promotes to."""
        return x.dtype if self.scale_in_float32 else torch.promote_types(x.dtype, weight.dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
