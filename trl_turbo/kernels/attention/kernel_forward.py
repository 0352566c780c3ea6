"""The forward kernel: a program takes a block of queries of one head past the keys that they see."""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_math import LOG2E, LOWEST, capped_tanh, exp2, load_rows, own_bounds, prefix_bounds, query_tile, store_rows


@triton.jit
def _sweep(
    acc,
    peak,
    total,
    q,
    k_ptr,
    k_token,
    v_ptr,
    v_token,
    query,
    first,
    stop,
    low,
    end,
    scale_2,
    softcap,
    slope,
    window,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Take keys `first` to `stop` into the running sums (arXiv:1805.02867); those from `low` to `end` are there."""
    for start in tl.range(first, stop, STEP, num_stages=STAGES):
        ahead = tl.cast(start, tl.int64)
        k = load_rows(k_ptr + ahead * k_token, k_token, low - start, end - start, MASKED, D, STEP, COLUMNS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            s = softcap * capped_tanh(s, slope)
        if MASKED:
            key = start + tl.arange(0, STEP)[None, :]
            seen = (key >= low) & (key <= query[:, None])
            if WINDOW:
                seen &= query[:, None] - key < window
            s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(peak, tl.max(s, 1) * scale_2)
        p = exp2(s * scale_2 - higher[:, None])
        shrink = exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = load_rows(v_ptr + ahead * v_token, v_token, low - start, end - start, MASKED, D, STEP, COLUMNS)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = higher
    return acc, peak, total


@triton.jit(do_not_specialize=["window"])
def forward_kernel(
    q_ptr,
    q_token,
    q_head,
    k_ptr,
    k_token,
    k_head,
    v_ptr,
    v_token,
    v_head,
    o_ptr,
    o_token,
    o_head,
    lse_ptr,
    lse_head,
    tiles_ptr,
    scale,
    softcap,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PREFIX: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """o and lse of one tile and head; `*_token` and `*_head` are strides. lse is in base 2, [HEADS, T].

    Heads are the inner index: those of a group read the same keys at the same time.
    """
    head = tl.program_id(0) % HEADS
    row, rows, index, start, prefix, before = query_tile(tiles_ptr, tl.program_id(0) // HEADS)
    head_64 = head.to(tl.int64)
    row_64 = row.to(tl.int64)
    k_ptr += (head // GROUP).to(tl.int64) * k_head
    v_ptr += (head // GROUP).to(tl.int64) * v_head
    q = load_rows(q_ptr + head_64 * q_head + row_64 * q_token, q_token, 0, rows, True, D, BLOCK, COLUMNS)
    acc = tl.zeros((BLOCK, COLUMNS), tl.float32)
    peak = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    # In powers of 2 the scale costs nothing: it is part of the product that shifts the exponent. A softcap has its own
    scale_2 = scale * LOG2E
    slope = scale
    if SOFTCAP:
        scale_2 = LOG2E
        slope = scale / softcap
    query = index + tl.arange(0, BLOCK)
    if PREFIX:
        low, first, whole = prefix_bounds(before, index, rows, window, WINDOW, STEP)
        k_prefix = k_ptr + prefix.to(tl.int64) * k_token
        v_prefix = v_ptr + prefix.to(tl.int64) * v_token
        acc, peak, total = _sweep(
            acc, peak, total, q, k_prefix, k_token, v_prefix, v_token, before + query, first, whole, low, before,
            scale_2, softcap, slope, window, True, WINDOW, SOFTCAP, PRECISION, D, COLUMNS, STEP, STAGES,
        )  # fmt: skip
        acc, peak, total = _sweep(
            acc, peak, total, q, k_prefix, k_token, v_prefix, v_token, before + query, whole, before, low, before,
            scale_2, softcap, slope, window, False, WINDOW, SOFTCAP, PRECISION, D, COLUMNS, STEP, STAGES,
        )  # fmt: skip
    first, whole, diagonal = own_bounds(index, rows, window, WINDOW, STEP)
    end = index + rows
    k_ptr += start.to(tl.int64) * k_token
    v_ptr += start.to(tl.int64) * v_token
    if WINDOW:
        acc, peak, total = _sweep(
            acc, peak, total, q, k_ptr, k_token, v_ptr, v_token, query, first, whole, 0, end,
            scale_2, softcap, slope, window, True, WINDOW, SOFTCAP, PRECISION, D, COLUMNS, STEP, STAGES,
        )  # fmt: skip
    acc, peak, total = _sweep(
        acc, peak, total, q, k_ptr, k_token, v_ptr, v_token, query, whole, diagonal, 0, end,
        scale_2, softcap, slope, window, False, WINDOW, SOFTCAP, PRECISION, D, COLUMNS, STEP, STAGES,
    )  # fmt: skip
    acc, peak, total = _sweep(
        acc, peak, total, q, k_ptr, k_token, v_ptr, v_token, query, diagonal, end, 0, end,
        scale_2, softcap, slope, window, True, WINDOW, SOFTCAP, PRECISION, D, COLUMNS, STEP, STAGES,
    )  # fmt: skip
    acc = acc / total[:, None]
    store_rows(o_ptr + head_64 * o_head + row_64 * o_token, o_token, acc, rows, D, BLOCK, COLUMNS)
    lane = tl.arange(0, BLOCK)
    tl.store(lse_ptr + head_64 * lse_head + row_64 + lane, peak + tl.log2(total), mask=lane < rows)
