"""One launch for a decode step's attention: programs share a sequence's cache, and the last one joins their parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trl_turbo.kernels.rows import on, processors
from trl_turbo.kernels.sizes import next_power_of_2

from .spec import Step


class Tile(NamedTuple):
    """How a program goes through its part of a cache.

    Attributes:
        tokens: That it multiplies at once.
        warps: Of it.
        stages: Of its loop. Since keys are found through a table, Triton 3.6 reads them ahead from five stages on.
    """

    tokens: int
    warps: int
    stages: int


#: For parts of a few tokens and for longer ones, of 18 tiles the best on an H200 for 8 sequences of a Qwen2.5-1.5B: 8.2
#: us a layer at 200 tokens, 25 a program, and 10.8 and 20.3 at 640 and 4,224.
SHORT, LONG = Tile(64, 8, 3), Tile(128, 4, 5)
#: Tokens of a program from which the longer one is used.
LONG_FROM = 64
#: Bytes of keys at once that leave room for all stages; wider heads take fewer tokens.
TILE_BYTES = 128 * 128 * 2
#: Most programs for one sequence and key-value head: the last one reads the parts of all.
MOST_PARTS = 32
# By device: parts with their maxima and sums, and how many have arrived, zero between launches. Launches of one stream
# share the last room; the ones before it stay, since a CUDA graph that was captured with them holds their addresses
_rooms: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}


@triton.jit
def _partner(columns, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of each column the one it is turned with, the column of its cosine, and whether it is the second of the two."""
    if INTERLEAVED:
        second = columns % 2 == 1
        other = tl.where(second, columns - 1, columns + 1)
        angle = columns // 2
    else:
        second = columns >= R // 2
        other = tl.where(second, columns - R // 2, columns + R // 2)
        angle = columns % (R // 2)
    return other, angle, second


@triton.jit
def _decode_kernel(
    query_ptr,
    query_row,
    query_head,
    key_ptr,
    key_row,
    key_head,
    value_ptr,
    value_row,
    value_head,
    keys_ptr,  # the caches
    keys_block,
    keys_token,
    keys_head,
    values_ptr,
    values_block,
    values_token,
    values_head,
    table_ptr,
    table_row,
    lens_ptr,
    slots_ptr,
    cos_sin_ptr,
    cos_sin_row,
    positions_ptr,
    parts_ptr,  # [B, Hk, P, ROWS, D + 2]: weighted values, maximum, sum
    arrived_ptr,  # [B, Hk]
    out_ptr,  # [B, Hq, D]
    scale,
    softcap,
    window,
    kv_heads,
    most_parts,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = pair // kv_heads
    kv_head = pair % kv_heads
    length = tl.load(lens_ptr + row)
    begin = 0
    if WINDOW:
        begin = tl.maximum(length - window, 0)
    each = tl.cdiv(tl.cdiv(length - begin, most_parts), TOKENS) * TOKENS
    first = begin + part * each
    if first >= length:  # padding ends here too
        return
    end = tl.minimum(first + each, length)
    parts = tl.cdiv(length - begin, each)

    heads = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDE)
    there = columns < D
    dtype = query_ptr.dtype.element_ty
    whole = (heads < GROUP)[:, None] & there[None, :]
    queries = query_ptr + row * query_row + (kv_head * GROUP + heads[:, None]) * query_head
    q = tl.load(queries + columns[None, :], mask=whole, other=0.0)
    if R > 0:
        other, angle, second = _partner(columns, R, INTERLEAVED)
        turned = columns < R
        angles = cos_sin_ptr + tl.load(positions_ptr + row).to(tl.int64) * cos_sin_row + angle
        cos = tl.load(angles, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(angles + R // 2, mask=turned, other=0.0).to(tl.float32)
        sin = tl.where(second, sin, -sin)
        q_other = tl.load(queries + other[None, :], mask=whole & turned[None, :], other=0.0)
        q = (q.to(tl.float32) * cos[None, :] + q_other.to(tl.float32) * sin[None, :]).to(dtype)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, WIDE], tl.float32)

    old = tl.minimum(end, length - 1)  # the new token is not in the cache yet
    tokens = tl.arange(0, TOKENS)
    for start in range(first, old, TOKENS):
        at = start + tokens
        known = at < old
        block = tl.load(table_ptr + row * table_row + at // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        place = at % BLOCK_SIZE
        keys = keys_ptr + block * keys_block + place * keys_token + kv_head * keys_head
        k = tl.load(keys[None, :] + columns[:, None], mask=known[None, :] & there[:, None], other=0.0)
        values = values_ptr + block * values_block + place * values_token + kv_head * values_head
        v = tl.load(values[:, None] + columns[None, :], mask=known[:, None] & there[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        scores = tl.where(known[None, :], scores, float("-inf"))
        top = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - top)
        weights = tl.exp(scores - top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        weighted = weighted * shrink[:, None] + tl.dot(weights.to(dtype), v, input_precision="ieee")
        largest = top

    if end == length:  # this program has the new token
        new_key = key_ptr + row * key_row + kv_head * key_head
        k_new = tl.load(new_key + columns, mask=there, other=0.0)
        if R > 0:
            k_other = tl.load(new_key + other, mask=there & turned, other=0.0)
            k_new = (k_new.to(tl.float32) * cos + k_other.to(tl.float32) * sin).to(dtype)
        v_new = tl.load(value_ptr + row * value_row + kv_head * value_head + columns, mask=there, other=0.0)
        slot = tl.load(slots_ptr + row).to(tl.int64)
        if slot >= 0:
            block_new = slot // BLOCK_SIZE
            place_new = slot % BLOCK_SIZE
            keys_new = keys_ptr + block_new * keys_block + place_new * keys_token + kv_head * keys_head
            values_new = values_ptr + block_new * values_block + place_new * values_token + kv_head * values_head
            tl.store(keys_new + columns, k_new, mask=there)
            tl.store(values_new + columns, v_new, mask=there)
        score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
        if SOFTCAP:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
        top = tl.maximum(largest, score)
        shrink = tl.exp(largest - top)
        weight = tl.exp(score - top)
        total = total * shrink + weight
        weighted = weighted * shrink[:, None] + weight[:, None] * v_new.to(tl.float32)[None, :]
        largest = top

    outs = out_ptr + (row * kv_heads * GROUP + kv_head * GROUP + heads[:, None]) * D + columns[None, :]
    if parts == 1:
        tl.store(outs, (weighted / total[:, None]).to(dtype), mask=whole)
        return
    mine = parts_ptr + (pair * most_parts + part) * ROWS * (WIDE + 2)
    tl.store(mine + heads[:, None] * WIDE + columns[None, :], weighted)
    tl.store(mine + ROWS * WIDE + heads, largest)
    tl.store(mine + ROWS * WIDE + ROWS + heads, total)
    tl.debug_barrier()  # all of this program's stores come before its arrival
    arrived = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel")
    if arrived == parts - 1:
        tl.debug_barrier()
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        weighted = tl.zeros([ROWS, WIDE], tl.float32)
        for index in range(parts):
            theirs = parts_ptr + (pair * most_parts + index) * ROWS * (WIDE + 2)
            # Past the first-level cache, which may have another layer's parts
            some = tl.load(theirs + heads[:, None] * WIDE + columns[None, :], cache_modifier=".cg")
            their_largest = tl.load(theirs + ROWS * WIDE + heads, cache_modifier=".cg")
            their_total = tl.load(theirs + ROWS * WIDE + ROWS + heads, cache_modifier=".cg")
            top = tl.maximum(largest, their_largest)
            shrink = tl.exp(largest - top)
            grow = tl.exp(their_largest - top)
            total = total * shrink + their_total * grow
            weighted = weighted * shrink[:, None] + some * grow[:, None]
            largest = top
        tl.store(outs, (weighted / total[:, None]).to(dtype), mask=whole)
        tl.store(arrived_ptr + pair, 0)


def parts_of(pairs: int, device: torch.device) -> int:
    """How many programs share a sequence and key-value head: as many as the device has processors for."""
    return max(1, min(MOST_PARTS, processors(device) // max(1, pairs)))


def tile_of(tokens: int, row_bytes: int) -> Tile:
    """For a part of so many tokens, whose keys take so many bytes each."""
    tile = LONG if tokens >= LONG_FROM else SHORT
    return tile._replace(tokens=max(16, min(tile.tokens, TILE_BYTES // row_bytes)))


def paged_decode_triton(
    step: Step, out: torch.Tensor, most_parts: int | None = None, length: int | None = None
) -> torch.Tensor:
    """See `op.paged_decode`; `most_parts` programs for a sequence and head."""
    query, key, value, key_cache, value_cache, block_table, seq_lens, slots, scale, rotation, window, softcap = step
    rows, heads, dim = query.shape
    kv_heads = key.shape[1]
    if rows == 0:
        return out
    group = heads // kv_heads
    most_parts = most_parts or parts_of(rows * kv_heads, query.device)
    wide, padded = max(16, next_power_of_2(dim)), max(16, next_power_of_2(group))
    tile = tile_of(LONG_FROM if length is None else length // most_parts, wide * query.element_size())
    parts, arrived = _room_for(query.device, rows * kv_heads * most_parts * padded * (wide + 2), rows * kv_heads)
    cos_sin, positions, interleaved = rotation or (query, seq_lens, False)
    if any(x.stride(-1) != 1 for x in (query, key, value, key_cache, value_cache, cos_sin)) or not out.is_contiguous():
        raise ValueError("paged_decode takes tensors whose columns are next to each other, and a contiguous out")
    with on(query.device):
        _decode_kernel[(rows * kv_heads, most_parts)](
            query,
            query.stride(0),
            query.stride(1),
            key,
            key.stride(0),
            key.stride(1),
            value,
            value.stride(0),
            value.stride(1),
            key_cache,
            key_cache.stride(0),
            key_cache.stride(1),
            key_cache.stride(2),
            value_cache,
            value_cache.stride(0),
            value_cache.stride(1),
            value_cache.stride(2),
            block_table,
            block_table.stride(0),
            seq_lens,
            slots,
            cos_sin,
            cos_sin.stride(0),
            positions,
            parts,
            arrived,
            out,
            scale,
            softcap,
            window or 0,
            kv_heads,
            most_parts,
            BLOCK_SIZE=key_cache.shape[1],
            GROUP=group,
            ROWS=padded,
            D=dim,
            WIDE=wide,
            R=cos_sin.shape[1] if rotation is not None else 0,
            INTERLEAVED=interleaved,
            WINDOW=window is not None,
            SOFTCAP=softcap != 0.0,
            TOKENS=tile.tokens,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def _room_for(device: torch.device, parts: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room that is large enough: about 1 MB on a GPU, which has no more programs than processors where it is used."""
    rooms = _rooms.setdefault(device, [])
    if not rooms or rooms[-1][0].numel() < parts or rooms[-1][1].numel() < pairs:
        sums = torch.empty(parts, dtype=torch.float32, device=device)
        rooms.append((sums, torch.zeros(pairs, dtype=torch.int32, device=device)))
    return rooms[-1]
