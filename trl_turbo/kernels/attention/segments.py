"""Where each sequence of a packed row lies, and which prompt it shares."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Segments:
    """A packed row of T tokens: segments one after another, some of them preceded by another one, their prefix.

    Built once for a forward pass by `build`; every layer and every backward uses the same one, and with it the tables
    that the kernels read, which are made when they are first asked for.

    Attributes:
        lengths: Tokens of each segment.
        prefix: Index of each segment's prefix, or -1.
        starts: First token of each segment.
        positions: int64 [T], what a rotary embedding needs: a token's index in its segment and the prefix's length.
    """

    lengths: tuple[int, ...]
    prefix: tuple[int, ...]
    starts: tuple[int, ...]
    positions: torch.Tensor
    _made: dict[Hashable, object] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        prefix: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Segments:
        """Lay out segments of `lengths` tokens.

        Args:
            lengths: Tokens of each segment, 0 or more.
            prefix: For each segment the index of the segment all of whose tokens precede it, or -1. A prefix has none
                itself. By default no segment has one.
            device: Where the packed row is.

        Raises:
            ValueError: A negative length, or a prefix that is not there or has one itself.
        """
        lengths = tuple(int(n) for n in lengths)
        prefix = (-1,) * len(lengths) if prefix is None else tuple(int(p) for p in prefix)
        _check(lengths, prefix)
        starts = tuple(itertools.accumulate(lengths, initial=0))[:-1]
        return cls(lengths, prefix, starts, _positions(lengths, prefix, torch.device(device or "cpu")))

    @property
    def total(self) -> int:
        """T, the tokens of all segments."""
        return self.positions.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the packed row is."""
        return self.positions.device

    @property
    def shared(self) -> bool:
        """Whether any token follows a prefix."""
        return self.cached(
            "shared",
            lambda: any(n and p >= 0 and self.lengths[p] for n, p in zip(self.lengths, self.prefix, strict=True)),
        )

    @property
    def even(self) -> bool:
        """Whether all segments are of one length, more than none, and follow no prefix: a batch without padding."""
        return bool(self.lengths) and self.lengths[0] > 0 and len(set(self.lengths)) == 1 and not self.shared

    def before(self, segment: int) -> int:
        """How many tokens precede this segment: its prefix's."""
        prefix = self.prefix[segment]
        return 0 if prefix < 0 else self.lengths[prefix]

    def cached(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gave the first time that it was asked for under `key`."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]


def _check(lengths: tuple[int, ...], prefix: tuple[int, ...]) -> None:
    if len(lengths) != len(prefix):
        raise ValueError(f"There are {len(lengths)} lengths and {len(prefix)} prefixes; give one of each a segment.")
    for i, (length, p) in enumerate(zip(lengths, prefix, strict=True)):
        if length < 0:
            raise ValueError(f"Segment {i} has {length} tokens; a length is 0 or more.")
        if not -1 <= p < len(lengths):
            raise ValueError(f"Segment {i}'s prefix is {p}; name one of the {len(lengths)} segments, or -1 for none.")
        if p >= 0 and prefix[p] >= 0:
            raise ValueError(f"Segment {i}'s prefix {p} has the prefix {prefix[p]}; a prefix must have none itself.")


def _positions(lengths: tuple[int, ...], prefix: tuple[int, ...], device: torch.device) -> torch.Tensor:
    sizes = torch.tensor(lengths, dtype=torch.int64)
    shift = torch.tensor([0 if p < 0 else lengths[p] for p in prefix], dtype=torch.int64)
    shift -= sizes.cumsum(0) - sizes
    return to_device(torch.arange(sum(lengths)) + shift.repeat_interleave(sizes), device)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x there, without waiting for what the device is doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
