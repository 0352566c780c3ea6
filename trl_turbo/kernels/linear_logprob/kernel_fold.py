"""The Triton kernel behind `kernel.fold`: one program a row takes a tile into the row's running sums."""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_math import FLOOR, LN2, LOG2E, REACH, capped, exp, exp2


@triton.jit
def _raw(tile_row_ptr, start, n_columns, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """A block of head outputs as they lie there, nothing beyond the tile."""
    columns = start + tl.arange(0, BLOCK)
    if EVEN:
        # One test for the block, whose lanes agree
        return tl.load(tile_row_ptr + columns, mask=tl.full((BLOCK,), start, tl.int32) < n_columns, other=0.0)
    else:
        return tl.load(tile_row_ptr + columns, mask=columns < n_columns, other=0.0)


@triton.jit
def _scaled(
    raw,
    bias_ptr,
    start,
    n_columns,
    logit_scale,
    softcap,
    inv_temperature,
    NEGATIVE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Head outputs such that z is `slope` times them, -inf beyond the tile; z itself under a softcap."""
    columns = start + tl.arange(0, BLOCK)
    x = raw.to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        x = capped(x, logit_scale, softcap, inv_temperature)
    elif NEGATIVE:
        x = -x
    if not EVEN:
        x = tl.where(columns < n_columns, x, -float("inf"))
    return x


@triton.jit
def _sweep(
    tile_row_ptr,
    bias_ptr,
    local,
    anchor,
    n_columns,
    slope,
    logit_scale,
    softcap,
    inv_temperature,
    NEGATIVE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    HAS_ACC: tl.constexpr,
    EVEN: tl.constexpr,
    CLAMP: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of a row, shifted by `anchor`. Lanes keep theirs until the end: a reduction a block is a barrier."""
    sums = tl.zeros((BLOCK,), tl.float32)
    shifted_sums = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    logits = tl.zeros((BLOCK,), tl.float32)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    before = tl.full((BLOCK,), -float("inf"), tl.float32)
    # In powers of 2 scale and shift are one instruction, whose 1e-7 of the anchor float32 logits would notice
    slope_2 = slope * LOG2E
    anchor_2 = anchor * LOG2E
    ahead = _raw(tile_row_ptr, 0, n_columns, EVEN, BLOCK)
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        raw = ahead
        ahead = _raw(tile_row_ptr, start + BLOCK, n_columns, EVEN, BLOCK)
        x = _scaled(
            raw,
            bias_ptr,
            start,
            n_columns,
            logit_scale,
            softcap,
            inv_temperature,
            NEGATIVE,
            HAS_BIAS,
            HAS_SOFTCAP,
            EVEN,
            BLOCK,
        )
        if EXACT:
            shifted = x * slope - anchor
            e = exp(shifted)
        else:
            shifted = x * slope_2 - anchor_2
            e = exp2(shifted)
        sums += e
        if HAS_ENTROPY:
            if CLAMP:
                shifted = tl.maximum(shifted, FLOOR)
            shifted_sums += e * shifted
        if HAS_SQUARES:
            squares += e * e
        if HAS_MEAN:
            logits += tl.where(columns < n_columns, x, 0.0)
        if HAS_TOP1:
            before = tl.maximum(before, tl.where(columns < local, x, -float("inf")))
        if HAS_ACC:
            if HAS_SOFTCAP:
                t = x / (softcap * inv_temperature)
                e = tl.where(e == 0, 0.0, e * (1 - t * t))
            if EVEN:
                tl.store(tile_row_ptr + columns, e.to(tile_row_ptr.dtype.element_ty))
            else:
                tl.store(tile_row_ptr + columns, e.to(tile_row_ptr.dtype.element_ty), mask=columns < n_columns)
        else:
            top = tl.maximum(top, x)
    return (
        tl.sum(sums, axis=0),
        tl.sum(shifted_sums, axis=0) * (1.0 if EXACT else LN2),
        tl.sum(squares, axis=0),
        tl.sum(logits, axis=0),
        tl.max(top, axis=0),
        tl.max(before, axis=0),
    )


@triton.jit
def fold_kernel(
    tile_ptr,  # [n, w]
    tile_stride,
    bias_ptr,  # [w]
    targets_ptr,  # [n] int64
    stats_ptr,  # [7, n] float32, rows as named in `tiles`
    stats_stride,
    acc_ptr,  # [n, A] float32
    acc_stride,
    acc_columns,
    vocab_start,
    n_columns,
    slope,  # |logit_scale / temperature|
    logit_scale,
    softcap,
    inv_temperature,
    NEGATIVE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    HAS_ACC: tl.constexpr,
    EVEN: tl.constexpr,
    CLAMP: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile's row into the row's statistics; with HAS_ACC the row becomes exponentials, see `tiles.fold`."""
    # Instructions bound this pass before memory does: with masks, two scalings and a comparison for the target on every
    # element it took 2.7 ms of a 13 ms step on an H200. So scale and shift are one multiply-add, the masks are the last
    # tile's alone, and the target is a scalar beside the row.
    row = tl.program_id(0).to(tl.int64)
    tile_row_ptr = tile_ptr + row * tile_stride
    stat_ptr = stats_ptr + row
    first = vocab_start == 0
    local = tl.load(targets_ptr + row) - vocab_start
    hit = (local >= 0) & (local < n_columns)
    if HAS_SOFTCAP:
        slope = 1.0
    # On the first tile what lies in `stats` is garbage, NaN perhaps: selected away, never multiplied by 0
    m_old = tl.where(first, -float("inf"), tl.load(stat_ptr))
    sum_old = tl.where(first, 0.0, tl.load(stat_ptr + stats_stride))
    if HAS_ACC:
        # What is written must have the new maximum: read for it first, and again below, then from the cache
        top = tl.full((BLOCK,), -float("inf"), tl.float32)
        ahead = _raw(tile_row_ptr, 0, n_columns, EVEN, BLOCK)
        for start in range(0, n_columns, BLOCK):
            raw = ahead
            ahead = _raw(tile_row_ptr, start + BLOCK, n_columns, EVEN, BLOCK)
            x = _scaled(
                raw,
                bias_ptr,
                start,
                n_columns,
                logit_scale,
                softcap,
                inv_temperature,
                NEGATIVE,
                HAS_BIAS,
                HAS_SOFTCAP,
                EVEN,
                BLOCK,
            )
            top = tl.maximum(top, x)
        anchor = tl.maximum(m_old, tl.max(top, axis=0) * slope)
    else:
        # The sums may stand on any shift near the maximum, so one reading does, unless the guess was far off
        anchor = m_old
        if m_old == -float("inf"):
            x = _scaled(
                _raw(tile_row_ptr, 0, n_columns, EVEN, BLOCK),
                bias_ptr,
                0,
                n_columns,
                logit_scale,
                softcap,
                inv_temperature,
                NEGATIVE,
                HAS_BIAS,
                HAS_SOFTCAP,
                EVEN,
                BLOCK,
            )
            anchor = tl.max(x, axis=0) * slope
    m = anchor
    anchor = tl.where(anchor == -float("inf"), 0.0, anchor)
    target = tl.load(tile_row_ptr + local, mask=hit, other=0.0).to(tl.float32)  # before the row is overwritten
    if HAS_BIAS:
        target += tl.load(bias_ptr + local, mask=hit, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        target = capped(target, logit_scale, softcap, inv_temperature)
    elif NEGATIVE:
        target = -target
    sums, shifted_sums, squares, logits, top, before = _sweep(
        tile_row_ptr,
        bias_ptr,
        local,
        anchor,
        n_columns,
        slope,
        logit_scale,
        softcap,
        inv_temperature,
        NEGATIVE,
        HAS_BIAS,
        HAS_SOFTCAP,
        HAS_ENTROPY,
        HAS_SQUARES,
        HAS_MEAN,
        HAS_TOP1,
        HAS_ACC,
        EVEN,
        CLAMP,
        EXACT,
        BLOCK,
    )
    if not HAS_ACC:
        m = tl.maximum(m_old, top * slope)
        safe = tl.where(m == -float("inf"), 0.0, m)
        if tl.abs(safe - anchor) > REACH:  # above it only where the guess was made from -inf alone
            anchor = safe
            sums, shifted_sums, squares, logits, top, before = _sweep(
                tile_row_ptr,
                bias_ptr,
                local,
                anchor,
                n_columns,
                slope,
                logit_scale,
                softcap,
                inv_temperature,
                NEGATIVE,
                HAS_BIAS,
                HAS_SOFTCAP,
                HAS_ENTROPY,
                HAS_SQUARES,
                HAS_MEAN,
                HAS_TOP1,
                HAS_ACC,
                EVEN,
                CLAMP,
                EXACT,
                BLOCK,
            )
        # From the guess to the maximum
        settle = tl.exp(anchor - safe)
        shifted_sums = (shifted_sums + (anchor - safe) * sums) * settle
        sums *= settle
        squares *= settle * settle
        anchor = safe
    rescale = tl.exp(m_old - anchor)
    tl.store(stat_ptr, m)
    tl.store(stat_ptr + stats_stride, sum_old * rescale + sums)
    if HAS_ENTROPY:
        # Sums of e (z - MAX), not of e z: at logits near 100 the latter loses the entropy's last digits
        old = tl.where(first, 0.0, tl.load(stat_ptr + 2 * stats_stride))
        moved = tl.where(rescale > 0, (m_old - anchor) * sum_old, 0.0)
        tl.store(stat_ptr + 2 * stats_stride, (old + moved) * rescale + shifted_sums)
    if HAS_SQUARES:
        old = tl.where(first, 0.0, tl.load(stat_ptr + 3 * stats_stride))
        tl.store(stat_ptr + 3 * stats_stride, old * rescale * rescale + squares)
    if HAS_MEAN:
        old = tl.where(first, 0.0, tl.load(stat_ptr + 4 * stats_stride))
        tl.store(stat_ptr + 4 * stats_stride, old + logits * slope)
    if HAS_TOP1:
        # argmax takes the first maximum, so a tie with an earlier token is no hit
        old = tl.where(first, -float("inf"), tl.load(stat_ptr + 5 * stats_stride))
        tl.store(stat_ptr + 5 * stats_stride, tl.maximum(old, before * slope))
    old = tl.where(first, float("nan"), tl.load(stat_ptr + 6 * stats_stride))
    tl.store(stat_ptr + 6 * stats_stride, tl.where(hit, target * slope, old))

    if HAS_ACC:
        tl.debug_barrier()  # the row is written before its target is cleared
        tl.store(tile_row_ptr + local, tl.zeros((), tile_ptr.dtype.element_ty), mask=hit)
        # The row's own program owns its sums too. With the common tokens first in a vocabulary, the maximum hardly ever
        # moves after the first tile, and then nothing is read here
        if (rescale != 1.0) & (vocab_start > 0):
            acc_row_ptr = acc_ptr + row * acc_stride
            for start in range(0, acc_columns, BLOCK):
                at = start + tl.arange(0, BLOCK)
                acc = tl.load(acc_row_ptr + at, mask=at < acc_columns, other=0.0)
                tl.store(acc_row_ptr + at, acc * rescale, mask=at < acc_columns)
