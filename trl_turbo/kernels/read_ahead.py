"""What the kernels behind a small one will read, brought into the L2 by programs that do nothing else.

Products and attention of a decode step with few sequences take turns, and each waits for the one before. The small ones
among them are over before the memory is busy; with these programs beside them it is, with weights that come next.
"""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trl_turbo.kernels.rows import processors
from trl_turbo.kernels.sizes import ceil_div

#: Bytes that one request brings in.
LINE_BYTES = 128


@triton.jit
def read_ahead(start_ptr, lines, program, programs, LINE: tl.constexpr, THREADS: tl.constexpr):
    """Ask for `lines` times LINE elements from `start_ptr` on, shared among `programs`, and do not wait for them."""
    mine = program * THREADS + tl.arange(0, THREADS)
    for first in range(0, lines, programs * THREADS):
        line = tl.minimum(first + mine, lines - 1).to(tl.int64)
        address = (start_ptr + line * LINE).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


def planned(ahead: torch.Tensor | None, width: int) -> tuple[int, int, int]:
    """Rows of programs that a grid has more for this, requests, and elements of one.

    Args:
        ahead: What to bring in, one-dimensional and dense, or nothing.
        width: Programs in a row of the grid.

    Returns:
        All 0 where there is nothing, or no GPU to ask.
    """
    if ahead is None or not ahead.is_cuda:
        return 0, 0, 0
    line = LINE_BYTES // ahead.element_size()
    lines = ahead.numel() // line
    return (ceil_div(processors(ahead.device), width), lines, line) if lines else (0, 0, 0)
