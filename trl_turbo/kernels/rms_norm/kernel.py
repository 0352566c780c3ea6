"""The Triton kernels and their launchers: each row stays in registers, and each tensor is read or written once."""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from trl_turbo.kernels.row_offset import row_offset
from trl_turbo.kernels.sizes import next_power_of_2


class Plan(NamedTuple):
    """A program's tile and its warps."""

    rows: int
    block: int
    warps: int


@functools.cache
def plan(width: int, elements: int) -> Plan:
    """For rows of `width` columns; a thread has 16 elements, two loads of 16 bytes in bf16, or 32 of large tiles."""
    block = next_power_of_2(width)
    rows = max(1, elements // block)
    per_thread = 16 if elements < 8192 and block <= 8192 else 32
    return Plan(rows, block, min(32, max(1, rows * block // (32 * per_thread))))


@triton.jit
def _scale(weight, offset, IN_FLOAT32: tl.constexpr):
    """The weight with its offset, rounded where Llama's form rounds."""
    scale = weight.to(tl.float32) + offset
    return scale if IN_FLOAT32 else scale.to(weight.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["n_rows", "x_inner", "r_inner"])
def forward_kernel(
    x_ptr,
    x_inner,
    x_outer,
    x_stride,
    residual_ptr,
    r_inner,
    r_outer,
    r_stride,
    weight_ptr,
    y_ptr,
    total_ptr,
    rstd_ptr,
    n_rows,
    eps,
    offset,
    ADD: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norms of ROWS rows, of x or of x + residual, which is then stored too."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    has_row = row < n_rows
    inside = has_row[:, None] & (column < D)
    dense = row.to(tl.int64)[:, None] * D + column
    x = tl.load(x_ptr + row_offset(row, x_inner, x_outer, x_stride)[:, None] + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    if ADD:
        residual = tl.load(
            residual_ptr + row_offset(row, r_inner, r_outer, r_stride)[:, None] + column, mask=inside, other=0.0
        )
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + dense, x, mask=inside)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)
    y = wide * rstd[:, None]
    if not IN_FLOAT32:
        y = y.to(x.dtype).to(tl.float32)
    y *= _scale(weight, offset, IN_FLOAT32)
    tl.store(y_ptr + dense, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=has_row)


@triton.jit
def _backward_rows(
    row,
    scale,
    grad_ptr,
    g_inner,
    g_outer,
    g_stride,
    x_ptr,
    x_inner,
    x_outer,
    x_stride,
    other_ptr,
    o_inner,
    o_outer,
    o_stride,
    rstd_ptr,
    grad_x_ptr,
    n_rows,
    ADD: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the gradient of these rows of x, and return what they add to the weight's, [ROWS, BLOCK]."""
    column = tl.arange(0, BLOCK)[None, :]
    has_row = row < n_rows
    inside = has_row[:, None] & (column < D)
    x = tl.load(x_ptr + row_offset(row, x_inner, x_outer, x_stride)[:, None] + column, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + row_offset(row, g_inner, g_outer, g_stride)[:, None] + column, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=has_row, other=0.0)[:, None]
    grad = grad.to(tl.float32)
    y = x.to(tl.float32) * rstd
    scaled = grad * scale
    new = (scaled - y * (tl.sum(scaled * y, 1) / D)[:, None]) * rstd
    if ADD:
        other = tl.load(
            other_ptr + row_offset(row, o_inner, o_outer, o_stride)[:, None] + column, mask=inside, other=0.0
        )
        new += other.to(tl.float32)
    dense = row.to(tl.int64)[:, None] * D + column
    tl.store(grad_x_ptr + dense, new.to(x.dtype), mask=inside)
    if not IN_FLOAT32:
        y = y.to(x.dtype).to(tl.float32)
    return grad * y


@triton.jit(do_not_specialize=["n_rows", "g_inner", "x_inner", "o_inner"])
def backward_kernel(
    grad_ptr,
    g_inner,
    g_outer,
    g_stride,
    x_ptr,
    x_inner,
    x_outer,
    x_stride,
    other_ptr,
    o_inner,
    o_outer,
    o_stride,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,  # [P, D] float32
    n_rows,
    offset,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of ROWS rows of x; with WEIGHT every P-th ROWS rows, and the sum of what they add to the weight's."""
    column = tl.arange(0, BLOCK)[None, :]
    scale = _scale(tl.load(weight_ptr + column, mask=column < D, other=0.0), offset, IN_FLOAT32)
    first = tl.program_id(0) * ROWS
    if WEIGHT:
        # Of long rows a thread has the same columns in each, so that adding them up moves nothing
        SUMS: tl.constexpr = 1 if BLOCK >= 1024 else ROWS
        total = tl.zeros((SUMS, BLOCK), tl.float32)
        for start in tl.range(first, n_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
            added = _backward_rows(
                start + tl.arange(0, ROWS),
                scale,
                grad_ptr,
                g_inner,
                g_outer,
                g_stride,
                x_ptr,
                x_inner,
                x_outer,
                x_stride,
                other_ptr,
                o_inner,
                o_outer,
                o_stride,
                rstd_ptr,
                grad_x_ptr,
                n_rows,
                ADD,
                IN_FLOAT32,
                D,
                BLOCK,
            )
            total += added if SUMS == ROWS else tl.sum(added, 0, keep_dims=True)
        sums = tl.sum(total, 0, keep_dims=True)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + column, sums, mask=column < D)
    else:
        _backward_rows(
            first + tl.arange(0, ROWS),
            scale,
            grad_ptr,
            g_inner,
            g_outer,
            g_stride,
            x_ptr,
            x_inner,
            x_outer,
            x_stride,
            other_ptr,
            o_inner,
            o_outer,
            o_stride,
            rstd_ptr,
            grad_x_ptr,
            n_rows,
            ADD,
            IN_FLOAT32,
            D,
            BLOCK,
        )


@triton.jit
def reduce_kernel(
    partial_ptr,  # [P, D] float32
    weight_ptr,  # [D], the sum
    n_partial,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of columns, always in the same order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, n_partial, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < n_partial)[:, None] & (column < D)[None, :]
        total += tl.load(partial_ptr + row[:, None] * D + column[None, :], mask=inside, other=0.0)
    tl.store(weight_ptr + column, tl.sum(total, 0).to(weight_ptr.dtype.element_ty), mask=column < D)
