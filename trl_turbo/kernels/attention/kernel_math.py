"""What the kernels share: rows in and out, and scores in powers of 2."""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import triton
import triton.language as tl

from trl_turbo.kernels.linear_logprob.kernel_math import LOG2E, PTX, exp2

#: Below every score, and finite: a row that has seen nothing yet is multiplied by 2^0, and not by NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def load_rows(ptr, token, first, end, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS rows at `ptr` [ROWS, COLUMNS], `token` elements apart; 0 before row `first`, from row `end` on, beyond D.

    What a neighbour holds must not be multiplied even by 0: it may be NaN. Where `token` is a constant, a thread's rows
    are one address and constants, which spares the backward some 60 registers; in 64 bits, or the compiler cannot tell.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row >= first) & (row < end)
    if D < COLUMNS:
        inside &= column < D
    return tl.load(ptr + row.to(tl.int64) * token + column, mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, token, x, end, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first `end` rows and D columns of x [ROWS, COLUMNS]."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    tl.store(ptr + row * token + column, x.to(ptr.dtype.element_ty), mask=(row < end) & (column < D))


@triton.jit
def store_stats(ptr, lse, delta, mask):
    """lse and delta side by side."""
    tl.store(ptr, lse, mask=mask)
    tl.store(ptr + 1, delta, mask=mask)


@triton.jit
def on_this_branch(x):
    """x, such that the compiler does not make a choice for each element of what is a branch for all."""
    if PTX:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], tl.float32, is_pure=False, pack=1)
    else:
        return x


@triton.jit
def capped_tanh(x, slope):
    """tanh(x * slope), by way of 2^x."""
    return 1.0 - 2.0 / (exp2(x * (slope * 2 * LOG2E)) + 1.0)


@triton.jit
def query_tile(tiles_ptr, tile):
    """A row of `tables.query_tiles`."""
    at = tiles_ptr + tile * 6
    return (
        tl.load(at),
        tl.load(at + 1),
        tl.load(at + 2),
        tl.load(at + 3),
        tl.load(at + 4),
        tl.load(at + 5),
    )


@triton.jit
def key_steps(before, index, rows, window, PREFIX: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """The steps that a block of queries goes over keys: its prefix's `before` keys, then those of its own segment.

    They are one loop, so that loads run ahead throughout. Those over the prefix end with it: the first one sticks out.

    Returns:
        The prefix's first key that is seen, the own segment's first step, how many steps go over the prefix, how many
        there are, and from which one on the diagonal needs a mask.
    """
    low = before * 0
    first = index * 0
    if WINDOW:
        low = tl.minimum(tl.maximum(before + index - window + 1, 0), before)
        first = tl.maximum(index - window + 1, 0) // STEP * STEP
    over_prefix = before * 0
    if PREFIX:
        over_prefix = tl.cdiv(before - low, STEP)
    steps = over_prefix + tl.cdiv(index + rows - first, STEP)
    diagonal = over_prefix + (index + 1 - first) // STEP
    return low, first, over_prefix, steps, diagonal


@triton.jit
def step_of(
    step,
    start,
    prefix,
    before,
    index,
    rows,
    window,
    low,
    first,
    over_prefix,
    diagonal,
    PREFIX: tl.constexpr,
    WINDOW: tl.constexpr,
    STEP: tl.constexpr,
):
    """One of `key_steps`.

    Returns:
        The packed row of its first key, in 64 bits, how far the first query is behind that key, the first of its keys
        that is there and is seen, the end of them, and whether a mask is needed.
    """
    key = first + (step - over_prefix) * STEP
    row = start + key
    behind = index - key
    skipped = key * 0
    left = index + rows - key
    masked = step >= diagonal
    if PREFIX:
        in_prefix = step < over_prefix
        other = before + (step - over_prefix) * STEP
        row = tl.where(in_prefix, prefix + other, row)
        behind = tl.where(in_prefix, before + index - other, behind)
        skipped = tl.where(in_prefix, tl.maximum(low - other, 0), 0)
        left = tl.where(in_prefix, STEP, left)
        masked = masked | (skipped > 0)
    if WINDOW:
        masked = masked | (behind + rows > window)
    return row.to(tl.int64), behind, skipped, left, masked
