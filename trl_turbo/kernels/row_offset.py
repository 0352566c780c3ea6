"""Where a row of `rows.Rows` starts, in a kernel."""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """In 64 bits, as a tensor may have more than 2^31 elements."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
