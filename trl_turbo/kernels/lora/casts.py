"""Adapters in the dtype in which they multiply: those of a pass in one launch, where they are of another.

Under autocast adapters are kept in float32, and a layer's passes cast each of them: 22 launches of the 26 a layer and
step, and five to lay lora_A side by side, which cost the host of a 1.5B model on short rows more than the products that
follow keep the device busy.
"""

from __future__ import annotations

import torch
from torch._utils import _unflatten_dense_tensors

from .spec import Linears, to

# What fewer take one by one is what a buffer and its views take
_FEWEST = 3


class Cast:
    """The adapters of some linears in the dtype in which they multiply; made when first asked for, for one pass.

    Args:
        linears: Whose.
        packed: With whose they are made.
    """

    def __init__(self, linears: Linears, packed: _Packed | None = None) -> None:
        self._linears = linears
        self._packed = _Packed((linears,)) if packed is None else packed
        self._a: torch.Tensor | None = None
        self._b: list[torch.Tensor] | None = None

    @property
    def a(self) -> torch.Tensor:
        """lora_A of all, [R, in]."""
        if self._a is None:
            packed = self._packed.of(self._linears)
            if packed is not None:
                self._a, self._b = packed
                return self._a
            stacked = [adapter.lora_A for adapter in self._linears.adapters]
            self._a = to(stacked[0] if len(stacked) == 1 else torch.cat(stacked), self._linears.compute)
        return self._a

    @property
    def b(self) -> list[torch.Tensor]:
        """lora_B of each, [out, r]."""
        if self._b is None:
            packed = self._packed.of(self._linears)
            if packed is not None:
                self._a, self._b = packed
                return self._b
            self._b = [to(adapter.lora_B, self._linears.compute) for adapter in self._linears.adapters]
        return self._b


def casts_of(*linears: Linears) -> list[Cast]:
    """A `Cast` of each of some linears of one pass, which needs them all."""
    packed = _Packed(linears)
    return [Cast(each, packed) for each in linears]


class _Packed:
    """What is cast together, in one buffer.

    Args:
        linears: Whose adapters.
    """

    def __init__(self, linears: tuple[Linears, ...]) -> None:
        self._linears = linears
        self._made: dict[Linears, tuple[torch.Tensor, list[torch.Tensor]]] | None = None

    def of(self, linears: Linears) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """lora_A of all [R, in] and lora_B of each [out, r]; `None` where they are cast one by one."""
        if self._made is None:
            self._made = _pack(self._linears)
        return self._made.get(linears)


def _pack(linears: tuple[Linears, ...]) -> dict[Linears, tuple[torch.Tensor, list[torch.Tensor]]]:
    pack = linears[0].pack
    sources = [x for each in linears for x in each.stacked]
    if pack is None or len(sources) < _FEWEST or any(each.pack != pack for each in linears):
        return {}
    flat = torch.empty(sum([x.numel() for x in sources]), dtype=linears[0].compute, device=sources[0].device)
    parts = _unflatten_dense_tensors(flat, sources)
    torch._foreach_copy_(parts, sources)
    found, at, offset = {}, 0, 0
    for each in linears:
        count = len(each.adapters)
        of_a, of_b = parts[at : at + count], parts[at + count : at + 2 * count]
        inputs = of_a[0].shape[1]
        a = of_a[0] if count == 1 else flat.as_strided((each.rank, inputs), (inputs, 1), offset)
        found[each] = a, list(of_b)
        at += 2 * count
        offset += each.elements
    return found
