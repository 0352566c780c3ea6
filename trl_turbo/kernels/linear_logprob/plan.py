"""How many rows and how much vocabulary one tile takes."""

from __future__ import annotations

import math

MIB = 1 << 20
# One Triton program holds one row of a tile in registers; 16,384 columns are 32 values a thread at 16 warps.
MAX_COLUMNS = 16_384
MAX_ROWS = 4_096


def default_budget_bytes(n_rows: int, width: int, itemsize: int) -> int:
    """Twice what the hidden states take, between 64 and 256 MiB: small batches stay small, large ones fill the GPU."""
    return min(max(2 * n_rows * width * itemsize, 64 * MIB), 256 * MIB)


def balanced(total: int, at_most: int, multiple: int = 128) -> int:
    """The size of equal pieces of `total`, none above `at_most` (where that is a multiple): 33,792 by 4,096 is 3,840."""
    if total <= at_most:
        return max(total, 1)
    pieces = math.ceil(total / at_most)
    return min(math.ceil(math.ceil(total / pieces) / multiple) * multiple, at_most)


def rows_outer(n_rows: int, vocab: int, acc_width: int, itemsize: int, budget_bytes: int) -> tuple[int, int]:
    """Rows and columns of a tile, where rows are the outer loop and a float32 [rows, acc_width] sum rides along."""
    rows, columns = min(MAX_ROWS, max(n_rows, 1)), min(MAX_COLUMNS, max(vocab, 1))

    def size(rows: int, columns: int) -> int:
        return rows * (columns * itemsize + acc_width * 4)

    while size(rows, columns) > budget_bytes and (rows > 1 or columns > 1):
        # Halve the longer side: the products are fastest where both stay long
        if columns > 2 * rows or rows == 1:
            columns = max(columns // 2, 1)
        else:
            rows = max(rows // 2, 1)
    return balanced(n_rows, rows), balanced(vocab, columns)


def vocab_outer(n_rows: int, vocab: int, width: int, itemsize: int, budget_bytes: int) -> tuple[int, int]:
    """Rows and columns of a tile, where the vocabulary is the outer loop over a float32 [columns, width] gradient."""
    rows, columns = min(2 * MAX_ROWS, max(n_rows, 1)), min(MAX_COLUMNS, max(vocab, 1))

    def size(rows: int, columns: int) -> int:
        return columns * (rows * itemsize + width * 4)

    while size(rows, columns) > budget_bytes and (rows > 1 or columns > 1):
        if columns > rows // 2 or rows == 1:
            columns = max(columns // 2, 1)
        else:
            rows = max(rows // 2, 1)
    return balanced(n_rows, rows), balanced(vocab, columns)
