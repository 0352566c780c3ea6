"""Backward, keys and values: a program takes a block of keys past the queries that see it; parts are summed after."""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import triton
import triton.language as tl

from trl_turbo.kernels.linear_logprob.kernel_math import LOG2E, exp2

from .kernel_math import capped_tanh, load_rows, on_this_branch, store_rows


@triton.jit(do_not_specialize=["window"])
def key_kernel(
    q_ptr,
    q_token: tl.constexpr,
    q_head,
    k_ptr,
    k_token: tl.constexpr,
    k_head,
    v_ptr,
    v_token: tl.constexpr,
    v_head,
    grad_o_ptr,
    grad_o_token: tl.constexpr,
    grad_o_head,
    grad_k_ptr,
    grad_v_ptr,
    grad_token: tl.constexpr,
    grad_head,
    sums_ptr,
    stats_ptr,
    stats_head,
    items_ptr,
    runs_ptr,
    scale,
    softcap,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """An item of `tables.KeyWork` for one of HEADS heads of keys: gradients of k and v, or a part of their sums.

    `stats_ptr` [query heads, T + room] has lse and delta, both float32, in the halves of an int64. `sums_ptr` [slots,
    HEADS, 2, BLOCK, D] is float32. Who adds what in which order is in the tables: no atomics, and the same sums each
    time. Adding the gradient of q here as well, by atomics, spares two of seven products and measured slower: on an
    H200, 8,192 tokens in bf16 with 16 heads of 128, 2.59 ms against 0.68 and 1.40 ms for the two passes.
    """
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    item_ptr = items_ptr + tl.program_id(0) // HEADS * 8
    row = tl.load(item_ptr).to(tl.int64)
    keys = tl.load(item_ptr + 1)
    position = tl.load(item_ptr + 2)
    low = tl.load(item_ptr + 3)
    high = tl.load(item_ptr + 4)
    run_low = tl.load(item_ptr + 5)
    run_high = tl.load(item_ptr + 6)
    slot = tl.load(item_ptr + 7)
    k = load_rows(k_ptr + head * k_head + row * k_token, k_token, 0, keys, D, BLOCK, COLUMNS)
    v = load_rows(v_ptr + head * v_head + row * v_token, v_token, 0, keys, D, BLOCK, COLUMNS)
    grad_k = tl.zeros((BLOCK, COLUMNS), tl.float32)
    grad_v = tl.zeros((BLOCK, COLUMNS), tl.float32)
    scale_2 = scale * LOG2E
    slope = scale
    if SOFTCAP:
        scale_2 = LOG2E
        slope = scale / softcap
    lane = tl.arange(0, STEP)
    for member in range(low, high):
        query_head = head * GROUP + member
        q_member = q_ptr + query_head * q_head
        grad_o_member = grad_o_ptr + query_head * grad_o_head
        stats_member = stats_ptr + query_head * stats_head
        for run in range(run_low, run_high):
            start = tl.load(runs_ptr + run * 4)
            end = tl.load(runs_ptr + run * 4 + 1)
            ahead = tl.load(runs_ptr + run * 4 + 2) - position  # of the first key
            for first in tl.range(start, end, STEP, num_stages=STAGES):
                here = tl.cast(first, tl.int64)
                behind = ahead + first - start
                q = load_rows(q_member + here * q_token, q_token, 0, end - first, D, STEP, COLUMNS)
                # Each thread loads its own columns': half as many in pairs, and a mask for each is many instructions.
                # Beyond T there is room
                pair = tl.load(stats_member + here + lane)
                lse = pair.to(tl.int32).to(tl.float32, bitcast=True)
                delta = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                if first + STEP > end:
                    # What is beyond is a neighbour's: 2^(s - inf) = 0
                    lse = tl.where(lane < end - first, on_this_branch(lse), float("inf"))
                    delta = tl.where(lane < end - first, delta, 0.0)
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                if SOFTCAP:
                    tanh = capped_tanh(s, slope)
                    s = softcap * tanh
                p = exp2(s * scale_2 - lse[None, :])
                masked = behind < keys - 1
                if WINDOW:
                    masked = masked | (behind + STEP > window)
                if masked:
                    distance = behind + lane[None, :] - tl.arange(0, BLOCK)[:, None]
                    seen = distance >= 0
                    if WINDOW:
                        seen &= distance < window
                    p = tl.where(seen, p, 0.0)
                grad_o = load_rows(grad_o_member + here * grad_o_token, grad_o_token, 0, end - first, D, STEP, COLUMNS)
                grad_v = tl.dot(p.to(grad_o.dtype), grad_o, grad_v, input_precision=PRECISION)
                grad_p = tl.dot(v, tl.trans(grad_o), input_precision=PRECISION)
                grad_s = p * (grad_p - delta[None, :])
                if SOFTCAP:
                    grad_s *= 1.0 - tanh * tanh
                grad_k = tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision=PRECISION)
    grad_k *= scale
    if slot < 0:
        at = head * grad_head + row * grad_token
        store_rows(grad_k_ptr + at, grad_token, grad_k, keys, D, BLOCK, COLUMNS)
        store_rows(grad_v_ptr + at, grad_token, grad_v, keys, D, BLOCK, COLUMNS)
    else:
        sums_ptr += (slot.to(tl.int64) * HEADS + head) * 2 * BLOCK * D
        store_rows(sums_ptr, D, grad_k, keys, D, BLOCK, COLUMNS)
        store_rows(sums_ptr + BLOCK * D, D, grad_v, keys, D, BLOCK, COLUMNS)


@triton.jit
def sum_kernel(
    sums_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_token: tl.constexpr,
    grad_head,
    parts_ptr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum the parts of ROWS rows of one block and head, in the tables' order, for k and then for v."""
    pieces: tl.constexpr = BLOCK // ROWS
    piece = tl.program_id(0) % pieces
    head = (tl.program_id(0) // pieces % HEADS).to(tl.int64)
    part_ptr = parts_ptr + tl.program_id(0) // pieces // HEADS * 4
    row = tl.load(part_ptr).to(tl.int64) + piece * ROWS
    keys = tl.load(part_ptr + 1) - piece * ROWS
    slot = tl.load(part_ptr + 2).to(tl.int64)
    count = tl.load(part_ptr + 3)
    sums_ptr += (slot * HEADS + head) * 2 * BLOCK * D + piece * ROWS * D
    to = head * grad_head + row * grad_token
    for which in tl.static_range(2):
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in range(count):
            at = sums_ptr + tl.cast(i, tl.int64) * (HEADS * 2 * BLOCK * D) + which * BLOCK * D
            total += load_rows(at, D, 0, keys, D, ROWS, COLUMNS)
        if which == 0:
            store_rows(grad_k_ptr + to, grad_token, total, keys, D, ROWS, COLUMNS)
        else:
            store_rows(grad_v_ptr + to, grad_token, total, keys, D, ROWS, COLUMNS)
