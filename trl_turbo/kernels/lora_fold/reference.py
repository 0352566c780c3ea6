"""Folding in plain torch, a piece of a weight at a time: the truth, and what serves the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .spec import LoraLayer, check_share

#: Rows are folded in pieces of this many elements, so that the temporaries in float32 stay small.
PIECE = 1 << 23
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass
class Piece:
    """Some rows of a weight, folded: what is needed to restore them."""

    rows: Tensor  # view of the weight, [n, in]
    index: Tensor  # elements that do not come back, [k], int32
    bits: Tensor  # what they were, [k]
    checksum: Tensor  # of all bits before, []


@dataclass
class FoldedPieces:
    """See `spec.Folded`."""

    layers: Sequence[LoraLayer]
    pieces: list[list[Piece]] = field(default_factory=list)  # by layer
    log_bytes: int = 0

    def restore(self) -> int:
        """See `spec.Folded.restore`."""
        changed = 0
        # zip is lazy: a layer or a piece that was not reached by a failed fold has nothing to take out
        for layer, pieces in zip(self.layers, self.pieces, strict=False):
            for piece, (_, delta) in zip(pieces, _deltas(layer), strict=False):
                changed += int(not _restore(piece, delta))
        return changed


def fold(layers: Sequence[LoraLayer], log_share: float) -> FoldedPieces:
    """See `op.fold`."""
    folded = FoldedPieces(layers)
    try:
        for layer in layers:
            pieces: list[Piece] = []
            folded.pieces.append(pieces)
            for rows, delta in _deltas(layer):
                piece = _fold(rows, delta)
                pieces.append(piece)
                folded.log_bytes += _nbytes(piece.index) + _nbytes(piece.bits)
        check_share(folded.log_bytes, (layer.weight for layer in layers), log_share)
    except BaseException:
        folded.restore()  # such as out of memory: what was folded so far must not stay
        raise
    return folded


def _deltas(layer: LoraLayer) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the weight [n, in] with what the adapter adds to them [n, in], float32; each time the same bits."""
    weight = layer.weight
    a = layer.lora_A.float()
    b = layer.lora_B.float() * layer.scaling
    step = max(1, PIECE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield weight[start : start + step], b[start : start + step] @ a


def _fold(rows: Tensor, delta: Tensor) -> Piece:
    bits = _bits(rows)
    folded = (rows.float() + delta).to(rows.dtype)
    back = _bits((folded.float() - delta).to(rows.dtype))
    index = (back != bits).flatten().nonzero().squeeze(-1)
    piece = Piece(rows, index.to(torch.int32), bits.flatten()[index].clone(), _checksum(bits))
    rows.copy_(folded)
    return piece


def _restore(piece: Piece, delta: Tensor) -> bool:
    rows = piece.rows
    rows.copy_((rows.float() - delta).to(rows.dtype))
    bits = _bits(rows)
    row, column = piece.index.long() // bits.shape[1], piece.index.long() % bits.shape[1]
    bits[row, column] = piece.bits
    return bool(_checksum(bits) == piece.checksum)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _checksum(bits: Tensor) -> Tensor:
    """A sum of all bits, each times its place, so that exchanged elements show."""
    by_column = bits.sum(0, dtype=torch.int64)
    weights = torch.arange(1, by_column.numel() + 1, device=bits.device)
    return (by_column * weights).sum()


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
