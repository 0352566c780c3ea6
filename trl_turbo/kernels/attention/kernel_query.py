"""Backward, queries: a program takes a block of queries of one head past the keys once more, for their gradient."""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import triton
import triton.language as tl

from trl_turbo.kernels.linear_logprob.kernel_math import LOG2E, exp2

from .kernel_math import capped_tanh, key_steps, load_rows, query_tile, step_of, store_rows, store_stats


@triton.jit(do_not_specialize=["window"])
def query_kernel(
    q_ptr,
    q_token: tl.constexpr,
    q_head,
    k_ptr,
    k_token: tl.constexpr,
    k_head,
    v_ptr,
    v_token: tl.constexpr,
    v_head,
    o_ptr,
    o_token: tl.constexpr,
    o_head,
    grad_o_ptr,
    grad_o_token: tl.constexpr,
    grad_o_head,
    grad_q_ptr,
    grad_q_token: tl.constexpr,
    grad_q_head,
    lse_ptr,
    lse_head,
    stats_ptr,
    stats_head,
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
    """The gradient of one tile and head of q, and for the keys' pass stats [HEADS, T + room, 2]: lse, and delta.

    delta is the sum of o * grad_o.
    """
    head = tl.program_id(0) % HEADS
    row, rows, index, start, prefix, before = query_tile(tiles_ptr, tl.program_id(0) // HEADS)
    head_64 = head.to(tl.int64)
    row_64 = row.to(tl.int64)
    k_ptr += (head // GROUP).to(tl.int64) * k_head
    v_ptr += (head // GROUP).to(tl.int64) * v_head
    grad_o_ptr += head_64 * grad_o_head + row_64 * grad_o_token
    grad_o = load_rows(grad_o_ptr, grad_o_token, 0, rows, D, BLOCK, COLUMNS)
    o = load_rows(o_ptr + head_64 * o_head + row_64 * o_token, o_token, 0, rows, D, BLOCK, COLUMNS)
    delta = tl.sum(o.to(tl.float32) * grad_o.to(tl.float32), 1)
    lane = tl.arange(0, BLOCK)
    at = head_64 * lse_head + row_64 + lane
    # 2^(s - inf) = 0 for rows that are not there
    lse = tl.load(lse_ptr + at, mask=lane < rows, other=float("inf"))
    store_stats(stats_ptr + head_64 * stats_head + 2 * (row_64 + lane), lse, delta, lane < rows)
    q = load_rows(q_ptr + head_64 * q_head + row_64 * q_token, q_token, 0, rows, D, BLOCK, COLUMNS)
    grad = tl.zeros((BLOCK, COLUMNS), tl.float32)
    scale_2 = scale * LOG2E
    slope = scale
    if SOFTCAP:
        scale_2 = LOG2E
        slope = scale / softcap
    low, first, over_prefix, steps, diagonal = key_steps(before, index, rows, window, PREFIX, WINDOW, STEP)
    for step in tl.range(0, steps, num_stages=STAGES):
        key_row, behind, skipped, left, masked = step_of(
            step, start, prefix, before, index, rows, window, low, first, over_prefix, diagonal, PREFIX, WINDOW, STEP
        )
        k = load_rows(k_ptr + key_row * k_token, k_token, skipped, left, D, STEP, COLUMNS)
        v = load_rows(v_ptr + key_row * v_token, v_token, skipped, left, D, STEP, COLUMNS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        grad_p = tl.dot(grad_o, tl.trans(v), input_precision=PRECISION)
        if SOFTCAP:
            tanh = capped_tanh(s, slope)
            s = softcap * tanh
        p = exp2(s * scale_2 - lse[:, None])
        if masked:
            distance = behind + lane[:, None] - tl.arange(0, STEP)[None, :]
            seen = (distance >= 0) & (tl.arange(0, STEP)[None, :] >= skipped)
            if WINDOW:
                seen &= distance < window
            p = tl.where(seen, p, 0.0)
        grad_s = p * (grad_p - delta[:, None])
        if SOFTCAP:
            grad_s *= 1.0 - tanh * tanh
        grad = tl.dot(grad_s.to(k.dtype), k, grad, input_precision=PRECISION)
    grad_q_ptr += head_64 * grad_q_head + row_64 * grad_q_token
    store_rows(grad_q_ptr, grad_q_token, grad * scale, rows, D, BLOCK, COLUMNS)
