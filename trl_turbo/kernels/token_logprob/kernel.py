"""Two passes: partial sums of pieces of each row, then one program a row that joins them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trl_turbo.kernels.sizes import ceil_div, next_power_of_2

#: Columns of one piece. A decode batch has few rows: with one program a row, 8 of an H200's 132 processors would work.
PIECE = 4096


@triton.jit
def _pieces_kernel(
    logits_ptr,
    stride,
    tokens_ptr,
    partial_ptr,  # [N, P, 3]: largest, sum of exponentials relative to it, how many are at least the token's
    pieces,
    width,
    PIECE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    columns = piece * PIECE + tl.arange(0, PIECE)
    z = tl.load(logits_ptr + row * stride + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
    chosen = tl.load(logits_ptr + row * stride + tl.load(tokens_ptr + row)).to(tl.float32)
    largest = tl.max(z, 0)
    # A piece of excluded tokens alone: exp(-inf - -inf) is NaN
    base = tl.where(largest == float("-inf"), 0.0, largest)
    into = partial_ptr + (row * pieces + piece) * 3
    tl.store(into, largest)
    tl.store(into + 1, tl.sum(tl.exp(z - base), 0))
    tl.store(into + 2, tl.sum(((z >= chosen) & (columns < width)).to(tl.float32), 0))


@triton.jit
def _join_kernel(
    logits_ptr,
    stride,
    tokens_ptr,
    partial_ptr,
    logps_ptr,
    ranks_ptr,
    pieces,
    PIECES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, PIECES)
    at = partial_ptr + (row * pieces + index) * 3
    there = index < pieces
    largest = tl.load(at, mask=there, other=float("-inf"))
    sums = tl.load(at + 1, mask=there, other=0.0)
    top = tl.max(largest, 0)
    total = tl.sum(tl.where(largest == float("-inf"), 0.0, sums * tl.exp(largest - top)), 0)
    chosen = tl.load(logits_ptr + row * stride + tl.load(tokens_ptr + row)).to(tl.float32)
    tl.store(logps_ptr + row, chosen - top - tl.log(total))
    # Counts of up to 2^24 are whole in float32
    tl.store(ranks_ptr + row, tl.sum(tl.load(at + 2, mask=there, other=0.0), 0).to(tl.int64))


def token_logprob_triton(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `op.token_logprob`."""
    n, width = logits.shape
    logps = torch.empty(n, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(n, dtype=torch.int64, device=logits.device)
    if n == 0:
        return logps, ranks
    pieces = ceil_div(width, PIECE)
    partial = torch.empty(n, pieces, 3, dtype=torch.float32, device=logits.device)
    _pieces_kernel[(n, pieces)](logits, logits.stride(0), tokens, partial, pieces, width, PIECE=PIECE)
    _join_kernel[(n,)](logits, logits.stride(0), tokens, partial, logps, ranks, pieces, PIECES=next_power_of_2(pieces))
    return logps, ranks
