"""The forward kernel: a program takes a block of queries of one head past the keys that they see."""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import triton
import triton.language as tl

from trl_turbo.kernels.linear_logprob.kernel_math import LOG2E, exp2

from .kernel_math import LOWEST, capped_tanh, key_steps, load_rows, query_tile, step_of, store_rows


@triton.jit(do_not_specialize=["window"])
def forward_kernel(
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

    Heads are the inner index: those of a group read the same keys at the same time. Running sums as in
    arXiv:1805.02867.
    """
    head = tl.program_id(0) % HEADS
    row, rows, index, start, prefix, before = query_tile(tiles_ptr, tl.program_id(0) // HEADS)
    head_64 = head.to(tl.int64)
    row_64 = row.to(tl.int64)
    k_ptr += (head // GROUP).to(tl.int64) * k_head
    v_ptr += (head // GROUP).to(tl.int64) * v_head
    q = load_rows(q_ptr + head_64 * q_head + row_64 * q_token, q_token, 0, rows, D, BLOCK, COLUMNS)
    acc = tl.zeros((BLOCK, COLUMNS), tl.float32)
    peak = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    # In powers of 2 the scale costs nothing: it is part of the product that shifts the exponent. A softcap has its own
    scale_2 = scale * LOG2E
    slope = scale
    if SOFTCAP:
        scale_2 = LOG2E
        slope = scale / softcap
    lane = tl.arange(0, BLOCK)
    low, first, over_prefix, steps, diagonal = key_steps(before, index, rows, window, PREFIX, WINDOW, STEP)
    for step in tl.range(0, steps, num_stages=STAGES):
        key_row, behind, skipped, left, masked = step_of(
            step, start, prefix, before, index, rows, window, low, first, over_prefix, diagonal, PREFIX, WINDOW, STEP
        )
        k = load_rows(k_ptr + key_row * k_token, k_token, skipped, left, D, STEP, COLUMNS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            s = softcap * capped_tanh(s, slope)
        if masked:
            distance = behind + lane[:, None] - tl.arange(0, STEP)[None, :]
            seen = (distance >= 0) & (tl.arange(0, STEP)[None, :] >= skipped)
            if WINDOW:
                seen &= distance < window
            s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(peak, tl.max(s, 1) * scale_2)
        p = exp2(s * scale_2 - higher[:, None])
        shrink = exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = load_rows(v_ptr + key_row * v_token, v_token, skipped, left, D, STEP, COLUMNS)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = higher
    acc = acc / total[:, None]
    store_rows(o_ptr + head_64 * o_head + row_64 * o_token, o_token, acc, rows, D, BLOCK, COLUMNS)
    tl.store(lse_ptr + head_64 * lse_head + row_64 + lane, peak + tl.log2(total), mask=lane < rows)
