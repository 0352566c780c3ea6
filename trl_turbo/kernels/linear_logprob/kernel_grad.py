"""The Triton kernels behind `kernel.jacobian` and `kernel.grad_tile`."""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_math import FLOOR, LN2, LOG2E, capped, exp, exp2


@triton.jit
def jacobian_kernel(
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
    """d logps / d hidden for a row and a block of features, see `tiles.jacobian`."""
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
def grad_kernel(
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
    """The loss's gradient in place of a row's logits, see `tiles.grad_tile`."""
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
        z = capped(x, logit_scale, softcap, inv_temperature)
        log2_p = (z - m - log_sum) * LOG2E
        p = exp2(log2_p)
    elif EXACT:
        log_p = x * slope - m - log_sum
        log2_p = log_p * LOG2E
        p = exp(log_p)
    else:
        log2_p = x * (slope * LOG2E) - (m + log_sum) * LOG2E
        p = exp2(log2_p)
    if HAS_GRAD_ENTROPY:
        grad = p * (flat + (steep * LN2) * tl.maximum(log2_p, FLOOR))
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
            z = capped(target, logit_scale, softcap, inv_temperature)
            t = z / (softcap * inv_temperature)
            bend = 1 - t * t
        else:
            z = target * slope
            bend = 1.0
        log_p = z - m - log_sum
        grad = g * slope + tl.exp(log_p) * flat
        if HAS_GRAD_ENTROPY:
            grad += tl.exp(log_p) * steep * tl.maximum(log_p, FLOOR)
        tl.debug_barrier()  # the row is written before its target is
        tl.store(tile_row_ptr + local, (grad * bend).to(tile_ptr.dtype.element_ty), mask=hit)
