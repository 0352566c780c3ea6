"""The Triton kernels, one program a row of a tile, and their launchers: the twins of `tiles`, call for call.

Rows are on the grid's first axis, which takes 2^31 - 1 blocks (the others take 65,535), and row offsets are int64: a tile
of 4,096 x 16,384 is small, but the hidden states and the head are not.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from .spec import Transform

# Columns that a program takes at a time, and its warps
_FOLD_BLOCK, _FOLD_WARPS = 1024, 4
_GRAD_BLOCK, _GRAD_WARPS = 8192, 8
_JACOBIAN_BLOCK, _JACOBIAN_WARPS = 1024, 4
# Stands for -inf where it is multiplied by e = 0
_FLOOR = tl.constexpr(-1e30)
# How far a guessed maximum may be off: squares of exp(30) still sum far below float32's 3e38
_REACH = tl.constexpr(30.0)


_LOG2E = tl.constexpr(1.4426950408889634)
_LOG2E_F = tl.constexpr(1.44269502162933349609375)  # log2(e) in float32, and the rest of it
_LOG2E_REST = tl.constexpr(1.92596299112661746887e-8)
_LN2 = tl.constexpr(0.6931471805599453)
# NVIDIA's own instruction, where there is a compiler for it (not in the interpreter, not on AMD)
_PTX = tl.constexpr(torch.version.cuda is not None and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"))


@triton.jit
def _exp2(x):
    """2^x, results below 1.2e-38 as 0: `tl.exp2` keeps those by a test and two products around each MUFU.EX2."""
    if _PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def _exp(x):
    """e^x with what x log2(e) loses to rounding put back: at x = -20 that is 1e-6 of the result."""
    t = x * _LOG2E
    lost = tl.fma(x, _LOG2E_F, -t) + x * _LOG2E_REST
    return tl.where(t > -125.0, _exp2(t) * (1.0 + lost * _LN2), _exp2(t))


@triton.jit
def _capped(x, logit_scale, softcap, inv_temperature):
    return softcap * (2 * tl.sigmoid(2 * x * logit_scale / softcap) - 1) * inv_temperature  # tanh by sigmoid


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
        x = _capped(x, logit_scale, softcap, inv_temperature)
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
    """The sums of a row, shifted by `anchor`. Each lane keeps its own until the end: a reduction a block is a barrier."""
    sums = tl.zeros((BLOCK,), tl.float32)
    shifted_sums = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    logits = tl.zeros((BLOCK,), tl.float32)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    before = tl.full((BLOCK,), -float("inf"), tl.float32)
    # In powers of 2 scale and shift are one instruction, whose 1e-7 of the anchor float32 logits would notice
    slope_2 = slope * _LOG2E
    anchor_2 = anchor * _LOG2E
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
            e = _exp(shifted)
        else:
            shifted = x * slope_2 - anchor_2
            e = _exp2(shifted)
        sums += e
        if HAS_ENTROPY:
            if CLAMP:
                shifted = tl.maximum(shifted, _FLOOR)
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
        tl.sum(shifted_sums, axis=0) * (1.0 if EXACT else _LN2),
        tl.sum(squares, axis=0),
        tl.sum(logits, axis=0),
        tl.max(top, axis=0),
        tl.max(before, axis=0),
    )


@triton.jit
def _fold_kernel(
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
        target = _capped(target, logit_scale, softcap, inv_temperature)
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
        if tl.abs(safe - anchor) > _REACH:  # above it only where the guess was made from -inf alone
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


@triton.jit
def _jacobian_kernel(
    acc_ptr,  # [n, H] float32
    acc_stride,
    stats_ptr,  # [7, n] float32
    stats_stride,
    weight_ptr,  # [V, H]
    weight_stride_row,
    weight_stride_column,
    targets_ptr,  # [n] int64
    out_ptr,  # [n, H]
    out_stride,
    vocab,
    n_columns,
    slope,
    temperature_over_softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_columns
    m = tl.load(stats_ptr + row)
    total = tl.load(stats_ptr + stats_stride + row)
    z = tl.load(stats_ptr + 6 * stats_stride + row)
    # 1 - p; where p is near 1, 1 - exp(-d) = d - d^2 / 2 + d^3 / 6 keeps the digits that the subtraction would lose
    gap = (m - z) + tl.log(total)
    gap = tl.where(gap < 0.0, 0.0, gap)
    own = tl.where(gap < 0.01, gap * (1 - gap * (0.5 - gap / 6)), 1 - tl.exp(-gap))
    if HAS_SOFTCAP:
        t = z * temperature_over_softcap
        own = own * (1 - t * t)
    target = tl.load(targets_ptr + row)
    target = tl.minimum(tl.maximum(target, 0), vocab - 1)  # such a row is NaN through z; it must only read in bounds
    weight = tl.load(
        weight_ptr + target * weight_stride_row + columns.to(tl.int64) * weight_stride_column, mask=inside, other=0.0
    )
    acc = tl.load(acc_ptr + row * acc_stride + columns, mask=inside, other=0.0)
    jac = (own * weight.to(tl.float32) - acc / total) * slope
    tl.store(out_ptr + row * out_stride + columns, jac.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grad_kernel(
    tile_ptr,  # [n, w]
    tile_stride,
    bias_ptr,  # [w]
    targets_ptr,  # [n] int64
    norm_ptr,  # [2, n] float32: maximum, log of the sum
    norm_stride,
    entropy_ptr,  # [n] float32
    grad_logps_ptr,  # [n] float32
    grad_entropy_ptr,  # [n] float32
    vocab_start,
    n_columns,
    slope,  # logit_scale / temperature
    logit_scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_LOGPS: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    EVEN: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    tile_row_ptr = tile_ptr + row * tile_stride
    m = tl.load(norm_ptr + row)
    log_sum = tl.load(norm_ptr + norm_stride + row)
    # grad / slope = 1[target] g - p (g + g_entropy (log p + entropy)), the latter as p (flat + steep log p)
    flat = 0.0
    if HAS_GRAD_LOGPS:
        g = tl.load(grad_logps_ptr + row)
        flat = -g * slope
        local = tl.load(targets_ptr + row) - vocab_start
        hit = (local >= start) & (local < start + BLOCK) & (local < n_columns)
        target = tl.load(tile_row_ptr + local, mask=hit, other=0.0).to(tl.float32)  # before the stores below
        if HAS_BIAS:
            target += tl.load(bias_ptr + local, mask=hit, other=0.0).to(tl.float32)
    if HAS_GRAD_ENTROPY:
        steep = -tl.load(grad_entropy_ptr + row) * slope
        flat += steep * tl.load(entropy_ptr + row)
    if EVEN:
        x = tl.load(tile_row_ptr + columns).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + columns).to(tl.float32)
    else:
        inside = columns < n_columns
        x = tl.load(tile_row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        z = _capped(x, logit_scale, softcap, inv_temperature)
        log2_p = (z - m - log_sum) * _LOG2E
        p = _exp2(log2_p)
    elif EXACT:
        log_p = x * slope - m - log_sum
        log2_p = log_p * _LOG2E
        p = _exp(log_p)
    else:
        log2_p = x * (slope * _LOG2E) - (m + log_sum) * _LOG2E
        p = _exp2(log2_p)
    if HAS_GRAD_ENTROPY:
        grad = p * (flat + (steep * _LN2) * tl.maximum(log2_p, _FLOOR))
    else:
        grad = p * flat
    if HAS_SOFTCAP:
        t = z / (softcap * inv_temperature)
        grad = grad * (1 - t * t)
    grad = grad.to(tile_ptr.dtype.element_ty)
    if EVEN:
        tl.store(tile_row_ptr + columns, grad)
    else:
        tl.store(tile_row_ptr + columns, grad, mask=inside)
    if HAS_GRAD_LOGPS:
        if HAS_SOFTCAP:
            z = _capped(target, logit_scale, softcap, inv_temperature)
            t = z / (softcap * inv_temperature)
            bend = 1 - t * t
        else:
            z = target * slope
            bend = 1.0
        log_p = z - m - log_sum
        grad = g * slope + tl.exp(log_p) * flat
        if HAS_GRAD_ENTROPY:
            grad += tl.exp(log_p) * steep * tl.maximum(log_p, _FLOOR)
        tl.debug_barrier()  # the row is written before its target is
        tl.store(tile_row_ptr + local, (grad * bend).to(tile_ptr.dtype.element_ty), mask=hit)


def fold(
    tile: torch.Tensor,  # [n, w]
    bias: torch.Tensor | None,  # [w]
    targets: torch.Tensor,  # [n]
    stats: torch.Tensor,  # [7, n]
    acc: torch.Tensor | None,  # [n, A]
    vocab_start: int,
    transform: Transform,
    outputs: tuple[str, ...],
) -> None:
    """See `tiles.fold`."""
    n, w = tile.shape
    if n == 0:
        return
    block = min(max(triton.next_power_of_2(w), 128), _FOLD_BLOCK)
    _fold_kernel[(n,)](
        tile,
        tile.stride(0),
        tile if bias is None else bias,
        targets,
        stats,
        stats.stride(0),
        stats if acc is None else acc,
        0 if acc is None else acc.stride(0),
        0 if acc is None else acc.shape[1],
        vocab_start,
        w,
        abs(transform.slope),
        transform.logit_scale,
        transform.softcap or 1.0,
        1 / transform.temperature,
        NEGATIVE=transform.slope < 0,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=transform.softcap is not None,
        HAS_ENTROPY="entropy" in outputs,
        HAS_SQUARES="logsumexp2" in outputs,
        HAS_MEAN="mean_logit" in outputs,
        HAS_TOP1="top1" in outputs,
        HAS_ACC=acc is not None,
        EVEN=w % block == 0,
        # Where -inf can be: outside of the tile, from a bias, from float16
        CLAMP=w % block != 0 or bias is not None or tile.dtype == torch.float16,
        EXACT=tile.dtype == torch.float32,
        BLOCK=block,
        num_warps=_FOLD_WARPS,
        enable_fp_fusion=tile.dtype != torch.float32,
    )


def jacobian(
    acc: torch.Tensor,  # [n, H]
    stats: torch.Tensor,  # [7, n]
    weight: torch.Tensor,  # [V, H]
    targets: torch.Tensor,  # [n]
    transform: Transform,
    out: torch.Tensor,  # [n, H]
) -> None:
    """See `tiles.jacobian`."""
    n, h = out.shape
    if n == 0 or h == 0:
        return
    _jacobian_kernel[(n, triton.cdiv(h, _JACOBIAN_BLOCK))](
        acc,
        acc.stride(0),
        stats,
        stats.stride(0),
        weight,
        weight.stride(0),
        weight.stride(1),
        targets,
        out,
        out.stride(0),
        weight.shape[0],
        h,
        transform.slope,
        transform.temperature / (transform.softcap or 1.0),
        HAS_SOFTCAP=transform.softcap is not None,
        BLOCK=_JACOBIAN_BLOCK,
        num_warps=_JACOBIAN_WARPS,
    )


def grad_tile(
    tile: torch.Tensor,  # [n, w]
    bias: torch.Tensor | None,  # [w]
    targets: torch.Tensor,  # [n]
    norm: torch.Tensor,  # [2, n]
    entropy: torch.Tensor | None,  # [n]
    grad_logps: torch.Tensor | None,  # [n]
    grad_entropy: torch.Tensor | None,  # [n]
    vocab_start: int,
    transform: Transform,
) -> None:
    """See `tiles.grad_tile`."""
    n, w = tile.shape
    if n == 0:
        return
    if grad_entropy is not None and entropy is None:
        raise ValueError("The gradient of the entropy needs the entropy.")
    block = min(max(triton.next_power_of_2(w), 128), _GRAD_BLOCK)
    _grad_kernel[(n, triton.cdiv(w, block))](
        tile,
        tile.stride(0),
        tile if bias is None else bias,
        targets,
        norm,
        norm.stride(0),
        norm if entropy is None else entropy,
        norm if grad_logps is None else grad_logps,
        norm if grad_entropy is None else grad_entropy,
        vocab_start,
        w,
        transform.slope,
        transform.logit_scale,
        transform.softcap or 1.0,
        1 / transform.temperature,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=transform.softcap is not None,
        HAS_GRAD_LOGPS=grad_logps is not None,
        HAS_GRAD_ENTROPY=grad_entropy is not None,
        EVEN=w % block == 0,
        EXACT=tile.dtype == torch.float32,
        BLOCK=block,
        num_warps=_GRAD_WARPS,
        enable_fp_fusion=tile.dtype != torch.float32,
    )
