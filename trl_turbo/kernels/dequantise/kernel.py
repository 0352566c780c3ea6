"""The Triton kernel: packed nibbles, scales and the scales of scales in, numbers out, in one launch."""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import triton
import triton.language as tl

# Of four packed bytes what their high nibbles stand for, then their low ones. The table lies in the lanes of a warp,
# twice, as of a lane's number five bits are read
_SHUFFLES = tl.constexpr(
    "{.reg .b32 lane, value, at; .reg .b64 ptr; mov.u32 lane, %laneid; and.b32 lane, lane, 15;"
    "mul.wide.u32 ptr, lane, 4; add.s64 ptr, ptr, $9; ld.global.nc.b32 value, [ptr];"
    + "".join(
        f"shr.u32 at, $8, {shift}; shfl.sync.idx.b32 ${into}, value, at, 31, -1;"
        for into, shift in enumerate((4, 12, 20, 28, 0, 8, 16, 24))
    )
    + "}"
)


@triton.jit
def dequantise_kernel(
    out_ptr,
    packed_ptr,
    table_ptr,
    absmax_ptr,
    nested_ptr,
    code_ptr,
    offset_ptr,
    n,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """Rows of COLUMNS packed bytes, none of which is in two blocks; NESTED is the blocksize of the scales, or 0.

    The product and the sum of a scale must be rounded apart, which only `enable_fp_fusion=False` sees to.
    """
    first = tl.program_id(0) * ROWS
    start = first.to(tl.int64) * COLUMNS
    rows = tl.arange(0, ROWS)
    # Four bytes a thread at a time, as their numbers in 16 bits are the 16 bytes that it stores side by side: with 16
    # bytes, as Triton would have it, the numbers go through shared memory or are stored 64 bytes from the neighbour's
    columns = tl.max_contiguous(tl.arange(0, COLUMNS), 4)
    at = rows[:, None] * COLUMNS + columns[None, :]
    to = rows[:, None] * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)[None, :]
    block = (first + rows) // (BLOCKSIZE // (2 * COLUMNS))
    if EVEN:
        packed = tl.load(packed_ptr + start + at, eviction_policy="evict_first")
        scale = tl.load(absmax_ptr + block)
    else:
        left = tl.minimum(n - 2 * start, 2 * ROWS * COLUMNS).to(tl.int32)
        has_row = rows * (2 * COLUMNS) < left
        packed = tl.load(packed_ptr + start + at, mask=2 * at < left, other=0)
        scale = tl.load(absmax_ptr + block, mask=has_row, other=0)
    if NESTED:
        of_scale = block // NESTED
        nested = tl.load(nested_ptr + of_scale) if EVEN else tl.load(nested_ptr + of_scale, mask=has_row, other=0.0)
        scale = tl.load(code_ptr + scale.to(tl.int32)) * nested + tl.load(offset_ptr)
    scale = scale[:, None]
    dtype = out_ptr.dtype.element_ty
    if SHUFFLE:
        high, low = tl.inline_asm_elementwise(
            _SHUFFLES,
            "=r,=r,=r,=r,=r,=r,=r,=r,r,l,l,l,l",
            [packed, table_ptr.to(tl.int64)],
            (tl.float32, tl.float32),
            is_pure=False,
            pack=4,
        )
    else:
        high, low = tl.load(table_ptr + (packed >> 4).to(tl.int32)), tl.load(table_ptr + (packed & 15).to(tl.int32))
    numbers = tl.interleave((high * scale).to(dtype), (low * scale).to(dtype))
    if EVEN:
        tl.store(out_ptr + 2 * start + to, numbers)
    else:
        tl.store(out_ptr + 2 * start + to, numbers, mask=to < left)
