"""The launcher: three launches, each over the tiles of all layers.

Count and fold see each element's way there and back; restore takes the way back. The log needs no atomics: counts by
tile, summed over the tiles, are where each tile writes. Beside the log they take 24 bytes a tile, 0.15 % of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from .kernel_tile import count_kernel, fold_kernel, restore_kernel
from .spec import LoraLayer, check_share
from .table import Table, Tile, tables

TILE = Tile(rows=64, columns=128, warps=8)

_LOG_BLOCK = 256
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# An entry of the log: the place in the tile above the bits
_ENTRY = {2: torch.int32, 4: torch.int64}


@dataclass
class _Part:
    """The layers of one table: what is needed to restore them."""

    table: Table
    checksums: torch.Tensor  # [T] int64, of the weights before
    ends: torch.Tensor  # [T] int64, where each tile's entries end
    log: torch.Tensor | None = None  # [K] int32 or int64; None while they are not folded


@dataclass
class FoldedTiles:
    """See `spec.Folded`."""

    layers: Sequence[LoraLayer]  # their memory must stay
    parts: list[_Part] = field(default_factory=list)
    log_bytes: int = 0

    @torch.no_grad()
    def restore(self) -> int:
        """See `spec.Folded.restore`."""
        device = self.layers[0].weight.device
        changed = torch.zeros(1, dtype=torch.int32, device=device)
        with _on(device):
            for part in self.parts:
                if part.log is not None:
                    _launch(restore_kernel, part, part.ends, part.log, part.checksums, changed, LOG_BLOCK=_LOG_BLOCK)
        return int(changed.item())


def fold(layers: Sequence[LoraLayer], log_share: float, tile: Tile = TILE) -> FoldedTiles:
    """See `op.fold`; the layers are such as `table.takes` says yes to.

    Args:
        layers: Weights with their adapters.
        log_share: What the log may take of the weights' bytes.
        tile: A program's share.
    """
    folded = FoldedTiles(layers)
    device = layers[0].weight.device
    with _on(device):
        for table in tables(layers, tile):
            counts = torch.empty(len(table.layer), dtype=torch.int32, device=device)
            part = _Part(table, torch.empty_like(counts, dtype=torch.int64), counts)
            _launch(count_kernel, part, counts, part.checksums)
            part.ends = counts.cumsum(0, dtype=torch.int64)
            folded.parts.append(part)
        sizes = torch.stack([part.ends[-1] for part in folded.parts]).tolist()
        # Nothing is changed before it is known that the log may be kept, and there is room for it
        entries = [_ENTRY[part.table.kind.weight.itemsize] for part in folded.parts]
        folded.log_bytes = sum(size * entry.itemsize for size, entry in zip(sizes, entries, strict=True))
        check_share(folded.log_bytes, (layer.weight for layer in layers), log_share)
        # Zeros name the first element of a tile, should one not be written: garbage would name places outside of it
        logs = [torch.zeros(size, dtype=entry, device=device) for size, entry in zip(sizes, entries, strict=True)]
        try:
            for part, log in zip(folded.parts, logs, strict=True):
                _launch(fold_kernel, part, part.ends, log)
                part.log = log
        except BaseException:
            folded.restore()  # the first launch of a kind compiles, which may fail
            raise
    return folded


def _launch(kernel: triton.JITFunction, part: _Part, *tensors: torch.Tensor, **constants: int) -> None:
    table = part.table
    kernel[(len(table.layer),)](
        table.fields,
        table.layer,
        *tensors,
        TYPE=_TYPES[table.kind.weight],
        A_TYPE=_TYPES[table.kind.lora_A],
        B_TYPE=_TYPES[table.kind.lora_B],
        SIZE=table.kind.weight.itemsize,
        ALIGNED=table.kind.aligned,
        EVEN=table.kind.even,
        ROWS=table.tile.rows,
        COLUMNS=table.tile.columns,
        num_warps=table.tile.warps,
        **constants,
    )


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, the stream being that one's current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
