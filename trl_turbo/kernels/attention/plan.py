"""How large a tile each pass takes, and with how many warps and stages."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """The shape of a program.

    Attributes:
        block: Rows that it keeps: queries in the forward and the queries' backward, keys in the keys' backward.
        step: Rows of the other side that it takes at once.
        warps: How many warps it has.
        stages: How many steps are on their way from memory at once.
    """

    block: int
    step: int
    warps: int
    stages: int

    def shared_bytes(self, columns: int, itemsize: int) -> int:
        """About what it takes of shared memory: the rows that it keeps (two tensors of them) and those on their way."""
        return 2 * columns * itemsize * (self.block + self.step * self.stages)


# By pass and columns of a head, in 16 bits; the first that fits into shared memory is taken.
_NARROW: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        64: (Tile(128, 128, 8, 3), Tile(128, 64, 4, 2), Tile(64, 64, 4, 2)),
        128: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
        256: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 16, 4, 1)),
    },
    "query": {
        64: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        128: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
        256: (Tile(64, 64, 8, 2), Tile(64, 16, 4, 2), Tile(32, 16, 4, 1)),
    },
    "key": {
        64: (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        128: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
        256: (Tile(64, 64, 8, 2), Tile(64, 16, 4, 2), Tile(32, 16, 4, 1)),
    },
}
_NARROW["all"] = _NARROW["key"]
# float32 is multiplied without tensor cores, or in three passes of them: operands take twice the room
_WIDE: dict[int, tuple[Tile, ...]] = {
    64: (Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)),
    128: (Tile(64, 32, 8, 2), Tile(32, 16, 4, 1)),
    256: (Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),
}
# Whether one pass makes all gradients: five products instead of seven, and float32 sums of q's gradient in memory
_FUSED: dict[int, bool] = {64: False, 128: False, 256: False}
# What the tuning mode of the benchmark sets instead
chosen: dict[tuple[str, int], Tile] = {}
chosen_fused: dict[int, bool] = {}


def fused(columns: int, dtype: torch.dtype) -> bool:
    """Whether the backward, unless it must be deterministic, is one pass over keys that adds to q's gradient."""
    return chosen_fused.get(columns, dtype.itemsize == 2 and _FUSED[max(columns, 64)])


def tile_of(which: str, columns: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of pass `which` (forward, query, key, and all for keys that make all gradients) for heads padded to `columns`."""
    if (which, columns) in chosen:
        return chosen[which, columns]
    return _tile_of(which, columns, dtype.itemsize, shared_limit(device))


@functools.cache
def _tile_of(which: str, columns: int, itemsize: int, limit: int) -> Tile:
    columns = max(columns, 64)
    tiles = _NARROW[which][columns] if itemsize == 2 else _WIDE[columns]
    return next((tile for tile in tiles if tile.shared_bytes(columns, itemsize) <= limit), tiles[-1])


@functools.cache
def shared_limit(device: torch.device) -> int:
    """Shared memory that a program may have; little where there is only the interpreter, which is slow with large tiles."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def processors(device: torch.device) -> int:
    """How many there are; few where there is only the interpreter, so that work is split there as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
