"""How large a tile each pass takes, and with how many warps and stages."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# lse and delta of a step, and what passes from warp to warp
_STATISTICS = 2048


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

    def shared_bytes(self, which: str, columns: int, itemsize: int) -> int:
        """About what pass `which` takes of shared memory: rows that it keeps, and those on their way."""
        kept = self.block if which == "forward" else 2 * self.block  # queries, or keys and values
        rows = kept + 2 * self.step * self.stages
        return columns * rows * itemsize + _STATISTICS


# By pass and columns of a head, in 16 bits; the first that fits into shared memory is taken. It measured fastest on an
# H200, 8,192 tokens with 16 heads and 4 of keys: `python -m benchmarks.kernels.attention --tune`.
_NARROW: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        64: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
        128: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
        256: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 16, 4, 1)),
    },
    "query": {
        64: (Tile(64, 64, 4, 2),),
        128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
        256: (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 16, 4, 1)),
    },
    "key": {
        64: (Tile(64, 64, 4, 2),),
        128: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
        256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 16, 4, 1)),
    },
}
# float32 is multiplied without tensor cores: small tiles spill least
_WIDE: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {64: (Tile(64, 32, 4, 2),), 128: (Tile(64, 32, 8, 2), Tile(32, 16, 4, 1)), 256: (Tile(16, 16, 4, 1),)},
    "query": {64: (Tile(32, 32, 4, 1),), 128: (Tile(64, 32, 8, 1), Tile(32, 16, 4, 1)), 256: (Tile(16, 16, 4, 1),)},
    "key": {64: (Tile(32, 32, 4, 1),), 128: (Tile(32, 16, 4, 1),), 256: (Tile(16, 16, 4, 1),)},
}
# What the tuning mode of the benchmark sets instead
chosen: dict[tuple[str, int], Tile] = {}


def tile_of(which: str, columns: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of a pass (forward, query, key) for heads padded to `columns`."""
    if (which, columns) in chosen:
        return chosen[which, columns]
    return tile(which, columns, dtype.itemsize, shared_limit(device))


@functools.cache
def tile(which: str, columns: int, itemsize: int, limit: int) -> Tile:
    """The first tile of a pass for elements of `itemsize` bytes that takes at most `limit` of shared memory."""
    columns = max(columns, 64)
    tiles = _NARROW[which][columns] if itemsize == 2 else _WIDE[which][columns]
    return next((one for one in tiles if one.shared_bytes(which, columns, itemsize) <= limit), tiles[-1])


@functools.cache
def shared_limit(device: torch.device) -> int:
    """Shared memory that a program may have; none where there is only the interpreter, with the smallest tiles."""
    if device.type != "cuda":
        return 0
    from triton.runtime import driver  # which refuses what takes more

    index = torch.cuda.current_device() if device.index is None else device.index
    return driver.active.utils.get_device_properties(index)["max_shared_mem"]
