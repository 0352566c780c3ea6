"""What the kernel reads instead of arguments: addresses and sizes of every layer, and which layer a tile belongs to."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .spec import DTYPES, LoraLayer

#: Columns of the table: addresses of weight, lora_A and lora_B; out, in, the weight's row stride, r; the bits of the
#: scaling in float32; the layer's first tile and how many it has.
FIELDS = 10
_LONGEST_ROW = 1 << 22
_LARGEST_TILE = 1 << 15


class Kind(NamedTuple):
    """What one launch has in common."""

    weight: torch.dtype
    lora_A: torch.dtype  # noqa: N815
    lora_B: torch.dtype  # noqa: N815
    aligned: bool  # rows of weight and lora_A start at multiples of 16 bytes and have multiples of 8 elements
    even: bool  # tiles do not reach beyond the last column


@dataclass(frozen=True)
class Tile:
    """A program's share of a weight, and its warps. Sides are powers of two.

    Raises:
        ValueError: It has more elements than the log's places and the checksum tell apart.
    """

    rows: int
    columns: int
    warps: int

    def __post_init__(self) -> None:
        if self.rows * self.columns > _LARGEST_TILE:
            raise ValueError(f"a tile of {self.rows} x {self.columns} has more than {_LARGEST_TILE:,} elements")


@dataclass(frozen=True)
class Table:
    """The layers of one kind on the device."""

    kind: Kind
    tile: Tile
    fields: torch.Tensor  # [L, FIELDS] int64
    layer: torch.Tensor  # [T] int32, by tile


def takes(layers: Sequence[LoraLayer]) -> bool:
    """Whether the kernel takes these layers: on one CUDA device, elements of a row side by side, dense adapters."""
    if not layers:
        return False
    device = layers[0].weight.device
    return device.type == "cuda" and all(
        weight.device == a.device == b.device == device
        and weight.ndim == 2
        and weight.numel() > 0
        and weight.stride(1) == 1
        and weight.shape[1] <= weight.stride(0) < _LONGEST_ROW
        and a.is_contiguous()
        and b.is_contiguous()
        and {a.dtype, b.dtype} <= set(DTYPES)
        for weight, a, b, _ in layers
    )


def tables(layers: Sequence[LoraLayer], tile: Tile) -> list[Table]:
    """The layers as one table for each kind: a single one, as models go."""
    kinds: dict[Kind, list[LoraLayer]] = {}
    for layer in layers:
        kinds.setdefault(_kind(layer, tile), []).append(layer)
    return [_table(kind, some, tile) for kind, some in kinds.items()]


def _kind(layer: LoraLayer, tile: Tile) -> Kind:
    weight, a, b, _ = layer
    addresses, lengths = weight.data_ptr() | a.data_ptr(), weight.shape[1] | weight.stride(0)
    aligned = addresses % 16 == 0 and lengths % 8 == 0
    return Kind(weight.dtype, a.dtype, b.dtype, aligned, weight.shape[1] % tile.columns == 0)


def _table(kind: Kind, layers: Sequence[LoraLayer], tile: Tile) -> Table:
    fields: list[list[int]] = []
    first = 0
    for weight, a, b, scaling in layers:
        n_rows, n_columns = weight.shape
        n_tiles = -(-n_rows // tile.rows) * -(-n_columns // tile.columns)
        (scaling_bits,) = struct.unpack("<i", struct.pack("<f", scaling))
        fields.append(
            [
                *(weight.data_ptr(), a.data_ptr(), b.data_ptr()),
                *(n_rows, n_columns, weight.stride(0), a.shape[0]),
                *(scaling_bits, first, n_tiles),
            ]
        )
        first += n_tiles
    on_device = torch.tensor(fields, dtype=torch.int64).to(layers[0].weight.device)
    layer = torch.repeat_interleave(on_device[:, -1].to(torch.int32), output_size=first)
    return Table(kind, tile, on_device, layer)
