"""The tokens of a padded batch that a scoring pass needs, as the sequences of a packed row.

What no asked token depends on is left out: padding, what follows the last asked token, rows of which nothing is asked.
Padding of which something is asked stays, behind all sequences, as onlookers: that is how some trainers' metrics are.
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
from trl_turbo.patches.attention.layout import Onlookers
from trl_turbo.patches.logprob.request import IGNORED

# Odd multipliers of a hash by columns; what it finds equal is compared, so a collision costs a prompt, not an error
_MULTIPLIER = 0x5851F42D4C957F2D


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the tokens of one pass lie.

    Attributes:
        segments: The sequences, prompts that are shared among them.
        index: int64 [T + P], where in the padded batch, as [B * L], each token of the packed row is, onlookers last.
        shape: (B, L).
        holes: Whether padding lies between tokens of one row, so that columns count it and sequences do not.
        full: Whether there is no padding at all.
        onlookers: The P tokens of padding of which something is asked, `None` where there are none.
    """

    segments: Segments
    index: torch.Tensor
    shape: tuple[int, int]
    holes: bool
    full: bool
    onlookers: Onlookers | None

    @property
    def saved(self) -> float:
        """The share of the batch's positions that the packed row does without."""
        return 1 - len(self.index) / (self.shape[0] * self.shape[1])

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [B, L] of the padded batch as a packed row [1, T + P]."""
        return values.reshape(-1).index_select(0, self.index).unsqueeze(0)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values [1, T + P] of the packed row back in [B, L], zero where there is no token."""
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
) -> Rows | str | None:
    """Lay out a padded batch as a packed row; one wait for the device.

    Args:
        input_ids: int64 [B, L].
        attention_mask: [B, L], zero at padding; `None` where there is none.
        targets: int64 [B, L], `IGNORED` where nothing is asked.
        position_ids: int64 [B, L]; prompts that are shared agree in them.
        share: Whether a prompt that several rows share is there once.
        reach: Whether the longest position must be there, as that of a token of its own if need be.

    Returns:
        The rows; why there are none; or `None` where nothing is asked, as where every answer is masked.
    """
    batch, length = input_ids.shape
    column = torch.arange(length, device=input_ids.device)
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    asked = targets != IGNORED
    first = torch.where(asked, column, length).amin(1, keepdim=True)
    last = torch.where(asked, column, -1).amax(1, keepdim=True)
    leading = valid & (column < first) & (last >= 0)
    own = valid & (column >= first) & (column <= last)
    kept, outside = leading | own, asked & ~valid

    n_leading, n_own, n_outside = leading.sum(1), own.sum(1), outside.sum(1)
    start, end = torch.where(kept, column, length).amin(1), torch.where(kept, column, -1).amax(1)
    holes = (end - start + 1 > n_leading + n_own).any()
    # An onlooker sees all of its row, so it must stand behind it, and something asked of the row itself before it
    astray = (outside & ((column < end[:, None]) | (n_own == 0)[:, None])).any()
    left_out = torch.where(kept | outside, -1, position_ids)
    short = left_out.amax() > torch.where(kept | outside, position_ids, -1).amax()
    leader = _leaders(leading, input_ids, position_ids) if share else torch.arange(batch, device=column.device)
    flags = torch.stack((holes, astray, short, valid.all())).long()
    numbers = torch.cat((flags, leader, n_leading, n_own, n_outside)).tolist()

    if numbers[1]:
        return "the trainer reads what the model says at padding before or between tokens"
    lengths, prefix, starts = _lay_out(*(numbers[4 + i * batch :][:batch] for i in range(3)))
    tokens = sum(lengths)
    if tokens == 0:
        return None
    flat = torch.arange(batch * length, device=column.device).view(batch, length)
    lead_start, own_start = torch.tensor(starts, device=column.device).unsqueeze(-1)
    places = torch.where(own, own_start + own.cumsum(1) - 1, lead_start + leading.cumsum(1) - 1)
    # What is left out goes behind the end, each to a place of its own, so that no write meets another
    there = own | (leading & (leader == torch.arange(batch, device=column.device))[:, None])
    index = _inverse(torch.where(there, places, tokens + flat), flat, tokens)
    if reach and numbers[2]:
        lengths, prefix = [*lengths, 1], [*prefix, -1]
        index = torch.cat((index, left_out.argmax().view(1)))
    onlookers = None
    if any(numbers[4 + 3 * batch :]):
        onlookers, more = _onlookers(outside, numbers[4 + 3 * batch :], places, kept, flat)
        index = torch.cat((index, more))
    segments = Segments.build(lengths, prefix, column.device)
    return Rows(segments, index, (batch, length), bool(numbers[0]), bool(numbers[3]), onlookers)


def _inverse(places: torch.Tensor, flat: torch.Tensor, count: int) -> torch.Tensor:
    """Which of `flat` is at each of the first `count` places; `places` are below count + flat.numel()."""
    return flat.new_empty(count + flat.numel()).scatter(0, places.view(-1), flat.view(-1))[:count]


def _onlookers(
    outside: torch.Tensor, counts: list[int], places: torch.Tensor, seen: torch.Tensor, flat: torch.Tensor
) -> tuple[Onlookers, torch.Tensor]:
    """The onlookers, and where in the batch they are, int64 [P]."""
    total, most = sum(counts), max(counts)
    number = (outside.view(-1).cumsum(0) - 1).view(outside.shape)  # in the order of the batch
    index = _inverse(torch.where(outside, number, total + flat), flat, total)
    rank = outside.cumsum(1) - 1
    queries = flat.new_zeros(len(flat), most + 1).scatter(1, torch.where(outside, rank, most), number.clamp(min=0))
    row = torch.arange(len(flat), device=flat.device)[:, None]
    back = (row * most + rank).view(-1).index_select(0, index)
    return Onlookers(queries[:, :most], back, torch.where(seen, places, 0), seen), index


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
    """Lengths and prefixes of the segments, and where each row's leading and own tokens start, shared or not."""
    lengths: list[int] = []
    prefix: list[int] = []
    lead_start, own_start = [0] * len(leader), [0] * len(leader)
    end = 0
    by_leader = sorted((row for row in range(len(leader)) if n_own[row]), key=leader.__getitem__)
    for first, members in itertools.groupby(by_leader, key=leader.__getitem__):
        group = list(members)
        before = -1
        if len(group) > 1 and n_leading[first]:
            before = len(lengths)
            lengths.append(n_leading[first])
            prefix.append(-1)
            for row in group:
                lead_start[row] = end
            end += n_leading[first]
        for row in group:
            alone = n_leading[row] if before < 0 else 0
            if before < 0:
                lead_start[row] = end
            own_start[row] = end + alone
            lengths.append(alone + n_own[row])
            prefix.append(before)
            end += lengths[-1]
    return lengths, prefix, (lead_start, own_start)
