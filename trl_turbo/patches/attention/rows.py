"""The tokens of a padded batch that a scoring pass needs, as the sequences of a packed row.

What no asked token depends on is left out: padding, what follows the last asked token, rows of which nothing is asked.
Where several rows begin with the same tokens in the same columns, up to where something is asked of them, these are
there once, and the rows follow them. Only causal attention may use this: it lets no token see a later one.

A rotary embedding that changes with the longest position (dynamic NTK, LongRoPE) sees the padding's: where the token of
the last position is left out, one token that has it stays as a sequence of its own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from trl_turbo.kernels.attention import Segments
from trl_turbo.patches.logprob.request import IGNORED

# Odd multipliers of a hash by columns; what it finds equal is compared, so a collision costs a prompt, not an error
_MULTIPLIER = 0x5851F42D4C957F2D


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the tokens of one pass lie.

    Attributes:
        segments: The sequences, prompts that are shared among them.
        index: int64 [T], where in the padded batch, as [B * L], each token of the packed row is.
        shape: (B, L).
        holes: Whether padding lies between tokens of one row, so that columns count it and sequences do not.
    """

    segments: Segments
    index: torch.Tensor
    shape: tuple[int, int]
    holes: bool

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [B, L] of the padded batch as a packed row [1, T]."""
        return values.reshape(-1).index_select(0, self.index).unsqueeze(0)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values [1, T] of the packed row back in [B, L], zero where there is no token."""
        batch, length = self.shape
        return values.new_zeros(batch * length).index_copy(0, self.index, values[0]).view(batch, length)


def find_rows(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    targets: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    share: bool,
    reach: bool,
) -> Rows | str:
    """Lay out a padded batch as a packed row; one wait for the device.

    Args:
        input_ids: int64 [B, L].
        attention_mask: [B, L], zero at padding; `None` where there is none.
        targets: int64 [B, L], `IGNORED` where nothing is asked.
        position_ids: int64 [B, L]; prompts that are shared agree in them.
        share: Whether a prompt that several rows share is there once.
        reach: Whether the longest position must be there, as that of a token of its own if need be.

    Returns:
        The rows, or why there are none.
    """
    batch, length = input_ids.shape
    column = torch.arange(length, device=input_ids.device)
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    asked = targets != IGNORED
    first = torch.where(asked, column, length).amin(1, keepdim=True)
    last = torch.where(asked, column, -1).amax(1, keepdim=True)
    leading = valid & (column < first) & (last >= 0)
    own = valid & (column >= first) & (column <= last)

    n_leading, n_own = leading.sum(1), own.sum(1)
    kept = leading | own
    span = torch.where(kept, column, -1).amax(1) - torch.where(kept, column, length).amin(1) + 1
    holes = (span > n_leading + n_own).any()
    unseen = (asked & ~valid).any()
    left_out = torch.where(kept, -1, position_ids)
    short = left_out.amax() > torch.where(kept, position_ids, -1).amax()
    leader = _leaders(leading, input_ids, position_ids) if share else torch.arange(batch, device=column.device)
    flags = torch.stack((unseen, holes, short)).long()
    numbers = torch.cat((flags, leader, n_leading, n_own)).tolist()

    if numbers[0]:
        return "the trainer reads what the model says at padding"
    lengths, prefix, starts = _lay_out(*(numbers[3 + i * batch :][:batch] for i in range(3)))
    total = sum(lengths)
    if total == 0:
        return "nothing is asked of the batch"
    lead_start, own_start = torch.tensor(starts, device=column.device).unsqueeze(-1)
    flat = torch.arange(batch * length, device=column.device).view(batch, length)
    # What is left out goes behind the end, each to a place of its own, so that no write meets another
    place = torch.where(own, own_start + own.cumsum(1) - 1, total + flat)
    place = torch.where(leading & (lead_start >= 0), lead_start + leading.cumsum(1) - 1, place)
    index = flat.new_empty(total + batch * length).scatter(0, place.view(-1), flat.view(-1))[:total]
    if reach and numbers[2]:
        lengths, prefix = [*lengths, 1], [*prefix, -1]
        index = torch.cat((index, left_out.argmax().view(1)))
    return Rows(Segments.build(lengths, prefix, column.device), index, (batch, length), bool(numbers[1]))


def _leaders(leading: torch.Tensor, ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """For each row the first one whose leading tokens, their columns and positions are its own; int64 [B]."""
    contents = [torch.where(leading, x, -1) for x in (ids, position_ids)]
    # Products and sums of int64 wrap around, which is what a hash wants
    powers = torch.arange(1, ids.shape[1] + 1, device=ids.device) * _MULTIPLIER | 1
    hashed = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    for content in contents:
        mixed = (content + 2) * powers
        hashed = hashed * _MULTIPLIER + (mixed ^ (mixed >> 29)).sum(1)
    leader = (hashed[:, None] == hashed[None, :]).long().argmax(1)  # the first of the equal ones
    same = torch.stack([(content == content[leader]).all(1) for content in contents]).all(0)
    return torch.where(same, leader, torch.arange(len(ids), device=ids.device))


def _lay_out(
    leader: list[int], n_leading: list[int], n_own: list[int]
) -> tuple[list[int], list[int], tuple[list[int], list[int]]]:
    """Lengths and prefixes of the segments, and where each row's leading and own tokens start (-1: not there)."""
    lengths: list[int] = []
    prefix: list[int] = []
    lead_start, own_start = [-1] * len(leader), [-1] * len(leader)
    end = 0
    by_leader = sorted((row for row in range(len(leader)) if n_own[row]), key=leader.__getitem__)
    for first, members in itertools.groupby(by_leader, key=leader.__getitem__):
        group = list(members)
        before = -1
        if len(group) > 1 and n_leading[first]:
            before = len(lengths)
            lengths.append(n_leading[first])
            prefix.append(-1)
            lead_start[group[0]] = end
            end += n_leading[first]
        for row in group:
            alone = n_leading[row] if before < 0 else 0
            if alone:
                lead_start[row] = end
            own_start[row] = end + alone
            lengths.append(alone + n_own[row])
            prefix.append(before)
            end += lengths[-1]
    return lengths, prefix, (lead_start, own_start)
