"""What each program of a launch does: no program is empty, and the longest start first.

Numbers are 32 bits wide: rows, not elements. A row is an index into the packed row of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .segments import Segments, to_device

#: Query rows times heads below which a key block's work is not split: sums of parts pass through memory.
LEAST_WORK = 2048
#: Items of a key block's work for each processor, so that the last ones to end end together.
ITEMS_EACH = 3


class KeyWork(NamedTuple):
    """The work of the pass over key blocks.

    Attributes:
        items: int32 [n, 8], longest first: first key row, keys, position of the first key, first head and end of heads
            in the group, first run and end of runs, and the slot for a part's sum, or -1 for a whole one.
        runs: int32 [n, 4] of query rows: first, end, position of the first, 0.
        parts: int32 [n, 4], blocks that are sums of parts: first key row, keys, first slot, slots.
        slots: How many there are.
    """

    items: torch.Tensor
    runs: torch.Tensor
    parts: torch.Tensor
    slots: int


def query_tiles(segments: Segments, block: int, window: int | None) -> torch.Tensor:
    """int32 [n, 6] of query blocks: first row, rows, index in the segment, its first row, its prefix's, its length."""
    return segments.cached(("queries", block, window), lambda: _query_tiles(segments, block, window))


def key_work(
    segments: Segments, block: int, step: int, group: int, heads: int, window: int | None, processors: int
) -> KeyWork:
    """The work for key blocks of `block` keys and steps of `step` queries, `group` query heads to each of `heads`."""
    key = ("keys", block, step, group, heads, window, processors)
    return segments.cached(key, lambda: _key_work(segments, block, step, group, heads, window, processors))


def _query_tiles(segments: Segments, block: int, window: int | None) -> torch.Tensor:
    lengths = torch.tensor(segments.lengths, dtype=torch.int64)
    counts = (lengths + block - 1) // block
    segment = torch.arange(len(counts)).repeat_interleave(counts)
    index = (torch.arange(len(segment)) - (counts.cumsum(0) - counts)[segment]) * block
    starts = torch.tensor(segments.starts, dtype=torch.int64)
    prefix = torch.tensor(segments.prefix, dtype=torch.int64)[segment]
    has = prefix >= 0
    prefix = prefix.clamp(min=0)
    before = torch.where(has, lengths[prefix], 0)
    rows = (lengths[segment] - index).clamp(max=block)
    start = starts[segment]
    seen = before + index + rows
    if window is not None:
        seen = seen.clamp(max=window + block)
    table = torch.stack((start + index, rows, index, start, torch.where(has, starts[prefix], 0), before), 1)
    order = seen.argsort(descending=True, stable=True)
    return to_device(table[order].to(torch.int32).contiguous(), segments.device)


def _key_work(
    segments: Segments, block: int, step: int, group: int, heads: int, window: int | None, processors: int
) -> KeyWork:
    blocks = _key_blocks(segments, block, window)
    total = sum(work for _, _, work in blocks) * group * heads
    most = max(LEAST_WORK, -(-total // (ITEMS_EACH * processors)))
    items: list[tuple[int, ...]] = []
    weights: list[int] = []
    all_runs: list[tuple[int, int, int, int]] = []
    parts: list[tuple[int, int, int, int]] = []
    slots = 0
    for head, runs, work in blocks:
        wanted = max(1, (2 * work * group + most) // (2 * most))  # rounded: a little too long is better than halved
        pieces = [runs]
        if wanted > group:
            pieces = _cut(runs, step * -(-work * group // (wanted * step)))
        ranges = _even(group, min(wanted, group))
        count = len(pieces) * len(ranges)
        for piece in pieces:
            first = len(all_runs)
            all_runs += piece
            rows = sum(end - start for start, end, _, _ in piece)
            for low, high in ranges:
                items.append((*head, low, high, first, len(all_runs), slots if count > 1 else -1))
                weights.append((rows + step) * (high - low))
                slots += count > 1
        if count > 1:
            parts.append((head[0], head[1], slots - count, count))
    order = sorted(range(len(items)), key=weights.__getitem__, reverse=True)
    device = segments.device
    return KeyWork(
        _table([items[i] for i in order], 8, device), _table(all_runs, 4, device), _table(parts, 4, device), slots
    )


def _key_blocks(
    segments: Segments, block: int, window: int | None
) -> list[tuple[tuple[int, int, int], list[tuple[int, int, int, int]], int]]:
    """For each key block its first row, keys and position, the runs of query rows that see it, and their rows."""
    followers: dict[int, list[int]] = {}
    for i, prefix in enumerate(segments.prefix):
        if prefix >= 0 and segments.lengths[i]:
            followers.setdefault(prefix, []).append(i)
    found = []
    for i, (start, length) in enumerate(zip(segments.starts, segments.lengths, strict=True)):
        before = segments.before(i)
        for index in range(0, length, block):
            keys = min(block, length - index)
            runs = [(start + index, start + length, before + index, 0)]
            for j in followers.get(i, ()):
                run = (segments.starts[j], segments.starts[j] + segments.lengths[j], length, 0)
                if window is None and runs[-1][1] == run[0]:
                    # All of it sees all of this block: it goes on as one run, of positions that nobody looks at
                    runs[-1] = (runs[-1][0], run[1], *runs[-1][2:])
                else:
                    runs.append(run)
            if window is not None:
                beyond = before + index + keys - 1 + window
                runs = [(a, min(b, a + beyond - at), at, 0) for a, b, at, _ in runs if at < beyond]
            found.append(((start + index, keys, before + index), runs, sum(b - a for a, b, _, _ in runs)))
    return found


def _cut(runs: list[tuple[int, int, int, int]], most: int) -> list[list[tuple[int, int, int, int]]]:
    """Runs in pieces of `most` rows, the last one smaller."""
    pieces: list[list[tuple[int, int, int, int]]] = []
    room = 0
    for start, end, at, _ in runs:
        while start < end:
            if room == 0:
                pieces.append([])
                room = most
            taken = min(room, end - start)
            pieces[-1].append((start, start + taken, at, 0))
            start, at, room = start + taken, at + taken, room - taken
    return pieces


def _even(total: int, count: int) -> list[tuple[int, int]]:
    """`range(total)` in `count` ranges of nearly one size."""
    edges = [total * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def _table(rows: Sequence[tuple[int, ...]], width: int, device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(rows, dtype=torch.int32).view(-1, width), device)
