"""What part of a weight a program reads, and how: chosen by shape, from a measurement where there is one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trl_turbo.kernels.sizes import ceil_div, next_power_of_2

#: Rows of x that a launch takes at most: the small side of one matrix instruction, or of two.
MOST_ROWS = 16
#: Shared memory of a Hopper processor that all programs on it may fill together.
SHARED_BYTES = 220 << 10
#: Processors of an H100 or H200.
PROCESSORS = 132
#: Programs on a processor at once that are tried.
PER_PROCESSOR = (2, 3, 4, 5)


@dataclass(frozen=True)
class Tile:
    """Of one launch.

    Attributes:
        rows: Of the weight (of each half, in `skinny_gated`), to a program; any number, so that programs can be shared
            evenly among processors.
        block_k: Columns of the weight that are read at a time.
        warps: Of a program.
        stages: Of its loop: reads on their way at once.
        split: Programs that share the columns; 1 in `skinny_gated`.
        swap: Whether the weight is the first side of the product, the long one of an instruction, or the second.
    """

    rows: int
    block_k: int
    warps: int
    stages: int
    split: int = 1
    swap: bool = True

    @property
    def block_n(self) -> int:
        """Rows of the weight in an instruction's tile, of which those beyond `rows` are not read."""
        return max(16, next_power_of_2(self.rows))

    def block_m(self, m: int) -> int:
        """Rows of x in it, of which those beyond `m` are not read."""
        return 8 if self.swap and m <= 8 else MOST_ROWS


#: Measured to be the fastest: by "gated" or "linear", M rounded up to 8 or 16, N (of a half, where gated) and K. On an
#: H200, for Qwen2.5-1.5B: 16.2 us for gate and up (cuBLAS and an activation: 19.1), 10.5 for down (11.1), 5.2 for
#: queries, keys and values (5.3), 4.8 for the output (5.2).
MEASURED: dict[tuple[str, int, int, int], Tile] = {
    ("gated", 8, 8960, 1536): Tile(rows=23, block_k=256, warps=2, stages=3),
    ("linear", 8, 1536, 8960): Tile(rows=16, block_k=128, warps=2, stages=7, split=4),
    ("linear", 8, 2048, 1536): Tile(rows=16, block_k=128, warps=2, stages=7, split=3),
    ("linear", 8, 1536, 1536): Tile(rows=16, block_k=128, warps=2, stages=7, split=4),
}


def gated_tile(m: int, n: int, k: int, processors: int = PROCESSORS) -> Tile:
    """For x [M, K] and a weight [2 * N, K] of 16-bit numbers."""
    found = MEASURED.get(("gated", _padded(m), n, k))
    if found is not None:
        return found
    tiles = [_gated(m, k, _even(n, share, processors), share, 128, 4) for share in PER_PROCESSOR[1:]]
    return max(tiles, key=lambda tile: tile.rows / tile.block_n)


def linear_tile(m: int, n: int, k: int, processors: int = PROCESSORS) -> Tile:
    """For x [M, K] and a weight [N, K] of 16-bit numbers."""
    found = MEASURED.get(("linear", _padded(m), n, k))
    return _linear(m, n, k, 32, 4, 128, 4, processors) if found is None else found


def candidates(kind: str, m: int, n: int, k: int, processors: int = PROCESSORS) -> list[Tile]:
    """What to measure for M rows and a weight: "gated" of halves [N, K], or "linear" [N, K]."""
    found = [gated_tile(m, n, k, processors) if kind == "gated" else linear_tile(m, n, k, processors)]
    found += [replace(found[0], **option) for option in ({"swap": False}, {"stages": 3})]
    shares = [(_even(n, share, processors), share) for share in PER_PROCESSOR]
    # And some that divide most weights, for which no masks are needed
    shares += [(rows, max(2, min(5, ceil_div(ceil_div(n, rows), processors)))) for rows in (16, 32)]
    for block_k in (64, 128, 256):
        for warps in (2, 4, 8):
            if kind == "gated":
                found += [_gated(m, k, rows, share, block_k, warps) for rows, share in shares]
            else:
                for rows in (16, 32, 64):
                    found += [_linear(m, n, k, rows, share, block_k, warps, processors) for share in PER_PROCESSOR]
    # With two stages nothing is read ahead
    return list(dict.fromkeys(found[:1] + [tile for tile in found if tile.stages > 2]))


def _even(n: int, share: int, processors: int) -> int:
    """Rows of a program where there are `share` of them a processor."""
    return max(8, min(ceil_div(n, share * processors), 64))


def _gated(m: int, k: int, rows: int, share: int, block_k: int, warps: int) -> Tile:
    """Programs of so many rows, `share` of them on a processor at once."""
    tile = Tile(rows, min(block_k, _whole(k)), warps, 2)
    return replace(tile, stages=_stages(tile, m, 2, share))


def _linear(m: int, n: int, k: int, rows: int, share: int, block_k: int, warps: int, processors: int) -> Tile:
    """As many parts of the columns as make no more than `share` programs a processor."""
    block_k = min(block_k, _whole(k))
    split = max(1, min(share * processors // ceil_div(n, rows), ceil_div(k, block_k)))
    tile = Tile(rows, block_k, warps, 2, split)
    return replace(tile, stages=_stages(tile, m, 1, share))


def _stages(tile: Tile, m: int, halves: int, share: int) -> int:
    """As many as there is shared memory for, where `share` programs divide it."""
    step = (halves * tile.block_n + tile.block_m(m)) * tile.block_k * 2
    # Triton keeps one buffer less than stages; but as many where the product is Hopper's instruction for four warps,
    # which reads its operands there while the next are on their way
    spare = 0 if tile.block_n >= 64 and tile.block_m(m) >= 16 and tile.warps >= 4 else 1
    return max(2, min(7, SHARED_BYTES // (share * step) + spare))


def _whole(k: int) -> int:
    return max(16, next_power_of_2(k))


def _padded(m: int) -> int:
    return 8 if m <= 8 else MOST_ROWS
