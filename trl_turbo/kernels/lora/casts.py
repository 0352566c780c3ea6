"""Adapters in the dtype in which they multiply: those of a pass in one launch, where they are kept in another.

Under autocast adapters are kept in float32, and each pass over a layer casts them anew: optimizers write weights
without a sign of it, so nothing of a pass is kept for the next. One by one that was 26 launches a layer and step, and
five more to lay lora_A side by side; a profile of one H200's host has 25 ms of a step of 265 in them, for a 1.5B model
on 8 x 640 tokens, whose device had work for 90 of them.
"""

from __future__ import annotations

import torch

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
    first = linears[0]
    sources = first.stacked
    for each in linears[1:]:
        if each.pack != first.pack:
            return {}
        sources += each.stacked
    if first.pack is None or len(sources) < _FEWEST:
        return {}
    elements = sum([each.elements for each in linears])
    flat = torch.empty(elements, dtype=first.compute, device=sources[0].device)
    parts: list[torch.Tensor] = []
    found = {}
    offset = 0
    for each in linears:
        count, inputs = len(each.adapters), each.stacked[0].shape[1]
        a = flat.as_strided((each.rank, inputs), (inputs, 1), offset)
        parts += (a,) if count == 1 else a.split_with_sizes(each.ranks)
        offset += each.rank * inputs
        b: list[torch.Tensor] = []
        for x, rank in zip(each.stacked[count:], each.ranks, strict=True):
            outputs = x.shape[0]
            b.append(flat.as_strided((outputs, rank), (rank, 1), offset))
            offset += outputs * rank
        parts += b
        found[each] = a, b
    torch._foreach_copy_(parts, sources)
    return found
