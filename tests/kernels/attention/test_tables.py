"""The kernels' tables: every pair of a query and a key that it sees is some program's, once."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention.cases import CASES, Case
from trl_turbo.kernels.attention import Segments, reference
from trl_turbo.kernels.attention.batches import _batches
from trl_turbo.kernels.attention.tables import ITEMS_EACH, key_work, query_tiles

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize("block", [16, 64])
def test_query_tiles_hold_every_row_once(case, block):
    segments = case.segments()
    rows = torch.zeros(segments.total, dtype=torch.int64)
    seen = []
    for row, count, index, start, prefix, before in query_tiles(segments, block, case.window).tolist():
        assert 0 < count <= block
        assert row == start + index
        assert index % block == 0
        rows[row : row + count] += 1
        assert segments.positions[row] == before + index
        assert before == 0 or segments.positions[prefix] == 0
        seen.append(min(before + index + count, case.window + block if case.window else 1 << 30))
    assert (rows == 1).all()
    assert seen == sorted(seen, reverse=True)


@each_case
@pytest.mark.parametrize("processors", [1, 40, 4000])
def test_key_items_hold_every_pair_once(case, processors, monkeypatch):
    monkeypatch.setattr("trl_turbo.kernels.attention.tables.LEAST_WORK", 16)
    segments, group, block = case.segments(), 3, 16
    work = key_work(segments, block, 8, group, 2, case.window, processors)
    pairs = torch.zeros(group, segments.total, segments.total, dtype=torch.int64)
    slots: dict[int, tuple[int, int]] = {}
    whole = set()
    for row, keys, position, low, high, first, last, slot in work.items.tolist():
        assert 0 < keys <= block
        assert low < high <= group
        assert first < last
        key = torch.arange(keys)
        for start, end, at, _ in work.runs[first:last].tolist():
            assert start < end
            distance = (torch.arange(end - start) + at)[:, None] - (position + key)[None, :]
            seen = distance >= 0
            if case.window is not None:
                seen &= distance < case.window
            assert seen.any(1).all()  # no row for nothing
            pairs[low:high, start:end, row : row + keys] += seen
        if slot < 0:
            assert (low, high) == (0, group)
            whole.add(row)
        else:
            assert slot not in slots
            slots[slot] = (row, keys)
    assert (pairs == reference.mask_of(segments, case.window)).all()
    summed = set()
    for row, keys, slot, count in work.parts.tolist():
        assert count > 1
        assert all(slots.pop(i) == (row, keys) for i in range(slot, slot + count))
        summed.add(row)
    assert not slots
    assert not whole & summed
    blocks = {start + i for start, n in zip(segments.starts, segments.lengths, strict=True) for i in range(0, n, block)}
    assert whole | summed == blocks
    if processors == 1 and len(blocks) > ITEMS_EACH * 4:
        assert work.slots <= 2 * len(blocks)
    if processors == 4000 and segments.total > 100:
        assert work.slots > 0


def test_a_heavy_prompt_is_split_and_light_blocks_are_not():
    """Prompt 2,048, eight completions of 512, heads of Qwen2.5-1.5B, on an H200."""
    segments = Segments.build([2048] + [512] * 8, [-1] + [0] * 8)
    work = key_work(segments, 128, 64, 6, 2, None, 132)
    rows = [sum(end - start for start, end, _, _ in work.runs[a:b].tolist()) for *_, a, b, _ in work.items.tolist()]
    sizes = [count * (high - low) for count, (_, _, _, low, high, *_) in zip(rows, work.items.tolist(), strict=True)]
    assert sum(sizes) == 6 * (16 * 4096 + 128 * sum(range(1, 17)) + 8 * 128 * sum(range(1, 5)))
    # With the longest first no processor is left with more than one item beyond its share
    assert max(sizes) <= 1.5 * sum(sizes) * 2 / 132
    split = {row for row, *_ in work.parts.tolist()}
    assert split == set(range(0, 2048, 128))


@each_case
def test_batches_hold_every_token_once_and_little_else(case):
    segments = case.segments()
    batches, back = _batches(segments, case.window)
    tokens = torch.cat([batch.rows.flatten()[batch.kept] for batch in batches])
    assert torch.equal(tokens[back], torch.arange(segments.total))
    for rows, keys, kept in batches:
        assert len(kept) >= 0.75 * rows.numel()
        assert keys.shape[0] == rows.shape[0]
        assert len(segments.positions[rows[:, 0]].unique()) == 1


def test_a_batch_is_no_larger_than_it_may_be():
    segments = Segments.build([1024] * 9)
    assert [len(batch.rows) for batch in _batches(segments, None)[0]] == [4, 4, 1]


def test_tables_are_made_once():
    segments = Segments.build([70, 40], [-1, 0])
    assert query_tiles(segments, 16, None) is query_tiles(segments, 16, None)
    assert query_tiles(segments, 16, 4) is not query_tiles(segments, 16, None)
    assert key_work(segments, 16, 16, 2, 1, None, 4) is key_work(segments, 16, 16, 2, 1, None, 4)


def test_many_segments():
    case = Case([1] * 70_000)
    assert len(query_tiles(case.segments(), 128, None)) == 70_000
    assert len(key_work(case.segments(), 128, 64, 2, 2, None, 132).items) == 70_000
