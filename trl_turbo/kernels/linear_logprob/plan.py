"""How many rows and how much vocabulary one tile takes."""

from __future__ import annotations

MIB = 1 << 20
# One Triton program holds one row of a tile in registers
MAX_COLUMNS = 16_384


def default_budget_bytes(n_rows: int, width: int, itemsize: int) -> int:
    """Twice what the hidden states take, between 64 and 256 MiB: small batches stay small, large ones fill the GPU."""
    return min(max(2 * n_rows * width * itemsize, 64 * MIB), 256 * MIB)


def rows_outer(n_rows: int, vocab: int, acc_width: int, itemsize: int, budget_bytes: int) -> tuple[int, int]:
    """Rows and columns of a tile, where rows are the outer loop and a float32 [rows, acc_width] sum rides along.

    Powers of two, not equal pieces: 2,048 or 4,096 rows of a sum fill the 132 processors of an H100 or H200 in whole
    waves, where equal pieces such as 3,840 leave a tenth of them idle; and a full row needs no masks.
    """
    rows, columns = min(4096, max(n_rows, 1)), min(MAX_COLUMNS, max(vocab, 1))

    def size() -> int:
        return rows * (columns * itemsize + acc_width * 4)

    while size() > budget_bytes and (rows > 1 or columns > 1):
        if columns > 2 * rows or rows == 1:
            columns = max(columns // 2, 1)
        else:
            rows = max(rows // 2, 1)
    return rows, columns


def vocab_outer(n_rows: int, vocab: int, width: int, itemsize: int, budget_bytes: int) -> tuple[int, int]:
    """Rows and columns of a tile, where the vocabulary is the outer loop over a float32 [columns, width] gradient.

    As many rows as fit: with all of them in one tile, the gradient is written once and never read back.
    """
    rows, columns = min(16_384, max(n_rows, 1)), min(4096, max(vocab, 1))

    def size() -> int:
        return columns * (rows * itemsize + (width * 4 if rows < n_rows else 0))

    while size() > budget_bytes and (rows > 1 or columns > 1):
        if rows > columns or columns == 1:
            rows = max(rows // 2, 1)
        else:
            columns = max(columns // 2, 1)
    return rows, columns
