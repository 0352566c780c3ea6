"""How many rows and how much vocabulary one tile takes."""

from __future__ import annotations

MIB = 1 << 20
# On the CPU a tile passes through a handful of float32 temporaries of its size, and nothing is gained beyond the caches
CPU_BYTES = 16 * MIB
COLUMNS = 8192


def rows_outer(n_rows: int, vocab: int, acc_width: int, itemsize: int, budget_bytes: int | None) -> tuple[int, int]:
    """Rows and columns of a tile, where rows are the outer loop and a float32 [rows, acc_width] sum rides along.

    With sums at most 2,048 x 8,192: in bf16 32 MiB, which the L2 of an H200 partly holds for the next kernel, and no
    larger tile measured more than 2% faster. 2,048 rows of a sum fill its 132 processors in whole waves, where equal
    pieces of N would leave some idle, and powers of two need no masks. Without sums at most 4,096 x 32,768: there the
    start and end of each product weigh more, 7.0 ms for N = 8,192 and H = 1,536 in small tiles and 6.7 in these.
    """
    most = (2048, COLUMNS) if acc_width else (4096, 4 * COLUMNS)
    rows, columns = min(most[0], max(n_rows, 1)), min(most[1], max(vocab, 1))
    if budget_bytes is None:
        return rows, columns

    def size() -> int:
        return rows * (columns * itemsize + acc_width * 4)

    while size() > budget_bytes and (rows > 1 or columns > 1):
        if columns > 4 * rows or rows == 1:
            columns = max(columns // 2, 1)
        else:
            rows = max(rows // 2, 1)
    return rows, columns


def vocab_outer(n_rows: int, vocab: int, width: int, itemsize: int, budget_bytes: int | None) -> tuple[int, int]:
    """Rows and columns of a tile, where the vocabulary is the outer loop over a float32 [columns, width] gradient.

    As many rows as fit: with all of them in one tile, the gradient is written once and never read back. By default that
    takes twice what the hidden states take, between 64 and 256 MiB.
    """
    if budget_bytes is None:
        budget_bytes = min(max(2 * n_rows * width * itemsize, 64 * MIB), 256 * MIB)
    rows, columns = min(16_384, max(n_rows, 1)), min(4096, max(vocab, 1))

    def size() -> int:
        return columns * (rows * itemsize + (width * 4 if rows < n_rows else 0))

    while size() > budget_bytes and (rows > 1 or columns > 1):
        if rows > columns or columns == 1:
            rows = max(rows // 2, 1)
        else:
            columns = max(columns // 2, 1)
    return rows, columns
