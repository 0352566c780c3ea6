"""Backward, queries: a program takes a block of queries of one head past the keys once more, for their gradient."""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_math import LOG2E, capped_tanh, exp2, load_rows, own_bounds, prefix_bounds, query_tile, store_rows


@triton.jit
def _sweep(
    grad,
    q,
    grad_o,
    lse,
    delta,
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
    """Add what keys `first` to `stop` give to the gradient; keys before `low` and from `end` on are 0, and add nothing."""
    for start in tl.range(first, stop, STEP, num_stages=STAGES):
        ahead = tl.cast(start, tl.int64)
        k = load_rows(k_ptr + ahead * k_token, k_token, low - start, end - start, MASKED, D, STEP, COLUMNS)
        v = load_rows(v_ptr + ahead * v_token, v_token, low - start, end - start, MASKED, D, STEP, COLUMNS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        grad_p = tl.dot(grad_o, tl.trans(v), input_precision=PRECISION)
        if SOFTCAP:
            tanh = capped_tanh(s, slope)
            s = softcap * tanh
        p = exp2(s * scale_2 - lse[:, None])
        if MASKED:
            key = start + tl.arange(0, STEP)[None, :]
            seen = (key >= low) & (key <= query[:, None])
            if WINDOW:
                seen &= query[:, None] - key < window
            p = tl.where(seen, p, 0.0)
        grad_s = p * (grad_p - delta[:, None])
        if SOFTCAP:
            grad_s *= 1.0 - tanh * tanh
        grad = tl.dot(grad_s.to(k.dtype), k, grad, input_precision=PRECISION)
    return grad


@triton.jit(do_not_specialize=["window"])
def query_kernel(
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
    grad_o_ptr,
    grad_o_token,
    grad_o_head,
    grad_q_ptr,
    grad_q_token,
    grad_q_head,
    lse_ptr,
    delta_ptr,
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
    """The gradient of one tile and head of q, and delta [HEADS, T], the sum of o * grad_o that the keys' pass reads."""
    head = tl.program_id(0) % HEADS
    row, rows, index, start, prefix, before = query_tile(tiles_ptr, tl.program_id(0) // HEADS)
    head_64 = head.to(tl.int64)
    row_64 = row.to(tl.int64)
    k_ptr += (head // GROUP).to(tl.int64) * k_head
    v_ptr += (head // GROUP).to(tl.int64) * v_head
    grad_o_ptr += head_64 * grad_o_head + row_64 * grad_o_token
    grad_o = load_rows(grad_o_ptr, grad_o_token, 0, rows, True, D, BLOCK, COLUMNS)
    o = load_rows(o_ptr + head_64 * o_head + row_64 * o_token, o_token, 0, rows, True, D, BLOCK, COLUMNS)
    delta = tl.sum(o.to(tl.float32) * grad_o.to(tl.float32), 1)
    lane = tl.arange(0, BLOCK)
    at = head_64 * lse_head + row_64 + lane
    tl.store(delta_ptr + at, delta, mask=lane < rows)
    # 2^(s - inf) = 0 for rows that are not there
    lse = tl.load(lse_ptr + at, mask=lane < rows, other=float("inf"))
    q = load_rows(q_ptr + head_64 * q_head + row_64 * q_token, q_token, 0, rows, True, D, BLOCK, COLUMNS)
    grad = tl.zeros((BLOCK, COLUMNS), tl.float32)
    scale_2 = scale * LOG2E
    slope = scale
    if SOFTCAP:
        scale_2 = LOG2E
        slope = scale / softcap
    query = index + lane
    if PREFIX:
        low, first, whole = prefix_bounds(before, index, rows, window, WINDOW, STEP)
        k_prefix = k_ptr + prefix.to(tl.int64) * k_token
        v_prefix = v_ptr + prefix.to(tl.int64) * v_token
        grad = _sweep(
            grad, q, grad_o, lse, delta, k_prefix, k_token, v_prefix, v_token, before + query, first, whole, low,
            before, scale_2, softcap, slope, window, True, WINDOW, SOFTCAP, PRECISION, D, COLUMNS, STEP, STAGES,
        )  # fmt: skip
        grad = _sweep(
            grad, q, grad_o, lse, delta, k_prefix, k_token, v_prefix, v_token, before + query, whole, before, low,
            before, scale_2, softcap, slope, window, False, WINDOW, SOFTCAP, PRECISION, D, COLUMNS, STEP, STAGES,
        )  # fmt: skip
    first, whole, diagonal = own_bounds(index, rows, window, WINDOW, STEP)
    end = index + rows
    k_ptr += start.to(tl.int64) * k_token
    v_ptr += start.to(tl.int64) * v_token
    if WINDOW:
        grad = _sweep(
            grad, q, grad_o, lse, delta, k_ptr, k_token, v_ptr, v_token, query, first, whole, 0, end,
            scale_2, softcap, slope, window, True, WINDOW, SOFTCAP, PRECISION, D, COLUMNS, STEP, STAGES,
        )  # fmt: skip
    grad = _sweep(
        grad, q, grad_o, lse, delta, k_ptr, k_token, v_ptr, v_token, query, whole, diagonal, 0, end,
        scale_2, softcap, slope, window, False, WINDOW, SOFTCAP, PRECISION, D, COLUMNS, STEP, STAGES,
    )  # fmt: skip
    grad = _sweep(
        grad, q, grad_o, lse, delta, k_ptr, k_token, v_ptr, v_token, query, diagonal, end, 0, end,
        scale_2, softcap, slope, window, True, WINDOW, SOFTCAP, PRECISION, D, COLUMNS, STEP, STAGES,
    )  # fmt: skip
    grad_q_ptr += head_64 * grad_q_head + row_64 * grad_q_token
    store_rows(grad_q_ptr, grad_q_token, grad * scale, rows, D, BLOCK, COLUMNS)
