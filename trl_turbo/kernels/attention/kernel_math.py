"""What the kernels share: rows in and out, and scores in powers of 2."""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import triton
import triton.language as tl

from trl_turbo.kernels.linear_logprob.kernel_math import LOG2E, exp2

#: Below every score, and finite: a row that has seen nothing yet is multiplied by 2^0, and not by NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def load_rows(ptr, token, first, end, MASKED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS rows at `ptr` [ROWS, COLUMNS], `token` elements apart; 0 before row `first`, from row `end` on, beyond D.

    What a neighbour holds must not be multiplied even by 0: it may be NaN.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    at = ptr + row * token + column
    if MASKED:
        inside = (row >= first) & (row < end)
        if D < COLUMNS:
            inside &= column < D
        return tl.load(at, mask=inside, other=0.0)
    elif D < COLUMNS:
        return tl.load(at, mask=column < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(ptr, token, x, end, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first `end` rows and D columns of x [ROWS, COLUMNS]."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    tl.store(ptr + row * token + column, x.to(ptr.dtype.element_ty), mask=(row < end) & (column < D))


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
def prefix_bounds(before, index, rows, window, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """Of a prefix's `before` keys: the first one seen, where steps begin, and from where on every query sees all.

    Steps end with the prefix, so that the one that sticks out is the first.
    """
    low = before * 0
    edge = before * 0
    if WINDOW:
        low = tl.minimum(tl.maximum(before + index - window + 1, 0), before)
        edge = tl.minimum(tl.maximum(before + index + rows - window, 0), before)
    first = before - tl.cdiv(before - low, STEP) * STEP
    whole = before - (before - edge) // STEP * STEP
    return low, first, whole


@triton.jit
def own_bounds(index, rows, window, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """Of a segment's own keys: where steps begin, from where on every query sees all, and where the diagonal begins."""
    diagonal = (index + 1) // STEP * STEP
    first = index * 0
    whole = index * 0
    if WINDOW:
        first = tl.maximum(index - window + 1, 0) // STEP * STEP
        whole = tl.minimum(tl.cdiv(tl.maximum(index + rows - window, 0), STEP) * STEP, diagonal)
    return first, whole, diagonal
