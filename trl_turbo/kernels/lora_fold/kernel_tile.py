"""The Triton kernels behind `kernel`: one program a tile of a weight, of whichever layer.

All three must see the same bits of what the adapter adds, so it is one chain of fused multiply-adds in float32, by
rank, which no compiler may reorder: a `tl.dot` may be summed in another order, and takes up an addend.
"""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import triton
import triton.language as tl

from trl_turbo.kernels.linear_logprob.kernel_math import PTX

from .table import FIELDS

_FIELDS = tl.constexpr(FIELDS)
_UNROLL = tl.constexpr(4)


@triton.jit
def _step(delta, a_ptr, b_ptr, scaling, has_column, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One rank more."""
    if EVEN:
        a = tl.load(a_ptr + tl.arange(0, COLUMNS)).to(tl.float32)
    else:
        a = tl.load(a_ptr + tl.arange(0, COLUMNS), mask=has_column, other=0.0).to(tl.float32)
    b = tl.load(b_ptr).to(tl.float32) * scaling
    a, b = tl.broadcast_to(a[None, :], (ROWS, COLUMNS)), tl.broadcast_to(b[:, None], (ROWS, COLUMNS))
    return tl.fma(b, a, delta)


@triton.jit
def _tile(
    table_ptr,
    layer_ptr,
    TYPE: tl.constexpr,
    A_TYPE: tl.constexpr,
    B_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Pointers to this program's weights [ROWS, COLUMNS], which of them exist, and what the adapter adds to them."""
    tile = tl.program_id(0)
    field_ptr = table_ptr + tl.load(layer_ptr + tile) * _FIELDS
    weight_ptr = tl.load(field_ptr).to(tl.pointer_type(TYPE))
    a_ptr = tl.load(field_ptr + 1).to(tl.pointer_type(A_TYPE))
    b_ptr = tl.load(field_ptr + 2).to(tl.pointer_type(B_TYPE))
    n_rows = tl.load(field_ptr + 3).to(tl.int32)
    n_columns = tl.load(field_ptr + 4).to(tl.int32)
    stride = tl.load(field_ptr + 5).to(tl.int32)
    rank = tl.load(field_ptr + 6).to(tl.int32)
    scaling = tl.load(field_ptr + 7).to(tl.int32).to(tl.float32, bitcast=True)
    local = tile - tl.load(field_ptr + 8).to(tl.int32)
    if ALIGNED:
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        a_ptr = tl.multiple_of(a_ptr, 16)
        n_columns = tl.multiple_of(n_columns, COLUMNS if EVEN else 8)
        stride = tl.multiple_of(stride, 8)
    across = tl.cdiv(n_columns, COLUMNS)
    row = local // across * ROWS
    column = local % across * COLUMNS
    # In 64 bits to the tile, in 32 within it
    corner_ptr = weight_ptr + row.to(tl.int64) * stride + column
    a_ptr += column
    b_ptr += row.to(tl.int64) * rank
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    has_row = rows < n_rows - row
    has_column = columns < n_columns - column
    inside = has_row[:, None] & has_column[None, :]
    weight_ptr = corner_ptr + rows[:, None] * stride + columns[None, :]
    weight = tl.load(weight_ptr, mask=inside, other=0.0)  # before the products, so that it comes in while they run
    # Zeros, in the registers where the weights will be: of `tl.zeros` the compiler gives a thread one column and all
    # rows, which loads as often as it multiplies, and moves the result through shared memory after
    delta = tl.load(weight_ptr, mask=inside & (rows < -rank)[:, None], other=0.0).to(tl.float32)
    # Rows beyond the last read the last one, as a mask would take registers, and are left out when stored
    b_ptr += tl.minimum(rows, n_rows - row - 1) * rank
    unrolled = rank // _UNROLL * _UNROLL
    for _ in range(0, unrolled, _UNROLL):
        for j in tl.static_range(_UNROLL):
            delta = _step(delta, a_ptr + j * n_columns, b_ptr + j, scaling, has_column, EVEN, ROWS, COLUMNS)
        a_ptr += _UNROLL * n_columns
        b_ptr += _UNROLL
    for _ in range(unrolled, rank):
        delta = _step(delta, a_ptr, b_ptr, scaling, has_column, EVEN, ROWS, COLUMNS)
        a_ptr += n_columns
        b_ptr += 1
    return weight_ptr, corner_ptr, stride, weight, inside, delta


@triton.jit
def _bits(x, SIZE: tl.constexpr):
    if SIZE == 2:
        return x.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        return x.to(tl.int32, bitcast=True)


@triton.jit
def _checksum(weight, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """All bits of a tile, each times an odd number of its own: a changed bit shows, and two exchanged elements do.

    Of 16 bits modulo 2^32, where the product of two differences, below 2^16 and 2^16, never is 0.
    """
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if SIZE == 2:
        products = _bits(weight, SIZE) * (2 * place + 1)
    else:
        products = _bits(weight, SIZE).to(tl.int64) * (2 * place + 1).to(tl.int64)
    return tl.sum(tl.sum(products, 1), 0).to(tl.int64)


@triton.jit
def _there_and_back(weight, delta, inside, TYPE: tl.constexpr, SIZE: tl.constexpr):
    folded = (weight.to(tl.float32) + delta).to(TYPE)
    back = (folded.to(tl.float32) - delta).to(TYPE)
    return folded, ((_bits(back, SIZE) != _bits(weight, SIZE)) & inside).to(tl.int32)


@triton.jit
def _store_where(ptr, x, where, SIZE: tl.constexpr):
    """Store those that `where` is not 0 for. `tl.store` would first move pointers, numbers and mask to other threads,
    through 64 KiB of shared memory, in the hope that neighbours write side by side.
    """
    if PTX and SIZE == 2:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0;}",
            "=r,l,r,r",
            [ptr.to(tl.int64), x, where],
            tl.int32,
            is_pure=False,
            pack=1,
        )
    elif PTX:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b64 [$1], $2; mov.b32 $0, 0;}",
            "=r,l,l,r",
            [ptr.to(tl.int64), x, where],
            tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(ptr, x, mask=where != 0)


@triton.jit
def count_kernel(
    table_ptr,
    layer_ptr,
    count_ptr,
    checksum_ptr,
    TYPE: tl.constexpr,
    A_TYPE: tl.constexpr,
    B_TYPE: tl.constexpr,
    SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """How many elements of each tile rounding does not bring back, and the checksum of its bits."""
    _, _, _, weight, inside, delta = _tile(table_ptr, layer_ptr, TYPE, A_TYPE, B_TYPE, ALIGNED, EVEN, ROWS, COLUMNS)
    _, lost = _there_and_back(weight, delta, inside, TYPE, SIZE)
    tl.store(count_ptr + tl.program_id(0), tl.sum(tl.sum(lost, 1), 0))
    tl.store(checksum_ptr + tl.program_id(0), _checksum(weight, SIZE, ROWS, COLUMNS))


@triton.jit
def fold_kernel(
    table_ptr,
    layer_ptr,
    end_ptr,
    log_ptr,
    TYPE: tl.constexpr,
    A_TYPE: tl.constexpr,
    B_TYPE: tl.constexpr,
    SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add the adapter, and write what rounding does not bring back to the log."""
    weight_ptr, _, _, weight, inside, delta = _tile(
        table_ptr, layer_ptr, TYPE, A_TYPE, B_TYPE, ALIGNED, EVEN, ROWS, COLUMNS
    )
    folded, lost = _there_and_back(weight, delta, inside, TYPE, SIZE)
    tl.store(weight_ptr, folded, mask=inside)
    # Behind the entries of the tiles, then of the rows, then of the columns before it
    by_row = tl.sum(lost, 1)
    at = (tl.cumsum(by_row, 0) - by_row)[:, None] + tl.cumsum(lost, 1) - 1
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if SIZE == 2:
        entry = (place << 16) | (_bits(weight, SIZE) & 0xFFFF)
    else:
        entry = (place.to(tl.int64) << 32) | (_bits(weight, SIZE).to(tl.int64) & 0xFFFFFFFF)
    start = tl.load(end_ptr + tl.program_id(0) - 1, mask=tl.program_id(0) > 0, other=0)
    # Other ones than were counted, should another stream change something in between, do not go beside the log
    counted = tl.load(end_ptr + tl.program_id(0)) - start == tl.sum(by_row, 0)
    _store_where(log_ptr + start + at, entry, lost * counted.to(tl.int32), SIZE)


@triton.jit
def restore_kernel(
    table_ptr,
    layer_ptr,
    end_ptr,
    log_ptr,
    checksum_ptr,
    changed_ptr,
    TYPE: tl.constexpr,
    A_TYPE: tl.constexpr,
    B_TYPE: tl.constexpr,
    SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
):
    """Subtract the adapter, put back what the log has, and count the tiles that are not what they were."""
    tile = tl.program_id(0)
    weight_ptr, corner_ptr, stride, folded, inside, delta = _tile(
        table_ptr, layer_ptr, TYPE, A_TYPE, B_TYPE, ALIGNED, EVEN, ROWS, COLUMNS
    )
    tl.store(weight_ptr, (folded.to(tl.float32) - delta).to(TYPE), mask=inside)
    tl.debug_barrier()  # other threads put the log's elements into the tile
    start = tl.load(end_ptr + tile - 1, mask=tile > 0, other=0)
    n_entries = (tl.load(end_ptr + tile) - start).to(tl.int32)
    for first in range(0, n_entries, LOG_BLOCK):
        at = first + tl.arange(0, LOG_BLOCK)
        entry = tl.load(log_ptr + start + at, mask=at < n_entries, other=0)
        place = (entry >> (8 * SIZE)).to(tl.int32) & 0xFFFF
        if SIZE == 2:
            was = entry.to(tl.int16).to(TYPE, bitcast=True)
        else:
            was = entry.to(tl.int32).to(TYPE, bitcast=True)
        tl.store(corner_ptr + place // COLUMNS * stride + place % COLUMNS, was, mask=at < n_entries)
    tl.debug_barrier()  # and what lies there now is checked
    weight = tl.load(weight_ptr, mask=inside, other=0.0)
    changed = _checksum(weight, SIZE, ROWS, COLUMNS) != tl.load(checksum_ptr + tile)
    tl.atomic_add(changed_ptr, changed.to(tl.int32), mask=changed)
