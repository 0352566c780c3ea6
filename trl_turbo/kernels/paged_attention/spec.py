"""What a decode step's attention is given."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rotation(NamedTuple):
    """A rotary embedding that queries and keys do not have yet.

    Attributes:
        cos_sin: [positions, R], the cosines in the first half of the columns and the sines in the second; R is even and
            no larger than the head dimension. Whatever lies behind R in a head is left as it is.
        positions: [B], integer.
        interleaved: Whether pairs are neighbours (GPT-J) and not R / 2 apart (GPT-NeoX).
    """

    cos_sin: torch.Tensor
    positions: torch.Tensor
    interleaved: bool = False


class Step(NamedTuple):
    """All of one step; see `op.paged_decode` for what each is."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    scale: float
    rotation: Rotation | None = None
    window: int | None = None
    softcap: float = 0.0
