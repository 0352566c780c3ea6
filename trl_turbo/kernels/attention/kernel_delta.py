"""Backward, before a pass that makes all gradients at once: the statistics that it reads."""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_math import load_rows, store_stats


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel(
    o_ptr,
    o_token,
    o_head,
    grad_o_ptr,
    grad_o_token,
    grad_o_head,
    lse_ptr,
    lse_head,
    stats_ptr,
    stats_head,
    tokens,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """stats [HEADS, T + room, 2] of BLOCK tokens of one head: lse, and the sum of o * grad_o."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first = tl.program_id(0) // HEADS * BLOCK
    row = first.to(tl.int64)
    o = load_rows(o_ptr + head * o_head + row * o_token, o_token, 0, tokens - first, D, BLOCK, COLUMNS)
    grad_o_ptr += head * grad_o_head + row * grad_o_token
    grad_o = load_rows(grad_o_ptr, grad_o_token, 0, tokens - first, D, BLOCK, COLUMNS)
    lane = tl.arange(0, BLOCK)
    delta = tl.sum(o.to(tl.float32) * grad_o.to(tl.float32), 1)
    at = head * lse_head + row + lane
    lse = tl.load(lse_ptr + at, mask=lane < tokens - first)
    store_stats(stats_ptr + head * stats_head + 2 * (row + lane), lse, delta, lane < tokens - first)
