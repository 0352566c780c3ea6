"""A lane between two kinds of host memory that is as late as it may be, and lets nobody off who does not wait."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from trl_turbo.patches.checkpointing.lane import Page, Pages, _pairs


@dataclass
class Moment:
    """When so many copies have been made; and the clock's time then."""

    copies: int
    time_ms: float = 0.0


@dataclass
class LateLane:
    """Copies when somebody waits, never before; until then what is fetched into is NaN.

    Attributes:
        device: Any.
        left: Bytes that the host can give.
        copy_ms: What each copy takes on the clock, waited for in full.
        layer_ms: What is computed between two copies that are started.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    left: int = 1 << 40
    copy_ms: float = 0.0
    layer_ms: float = 1.0
    clock_ms: float = 0.0
    made: int = 0
    stored: int = 0
    loaded: int = 0
    waits: int = 0
    late: list[Callable[[], None]] = field(default_factory=list)
    inputs: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pages = Pages(self._pin, lambda: (self.left, 0))

    @property
    def grown(self) -> int:
        return self.pages.slabs

    def take(self, nbytes: int) -> list[Page] | None:
        return self.pages.take(nbytes)

    def give_back(self, pages: list[Page]) -> None:
        self.pages.give_back(pages)

    def store(self, x: torch.Tensor, pages: list[Page]) -> Moment:
        held = weakref.ref(x)
        self.stored += 1

        def copy() -> None:
            source = held()
            assert source is not None, "let go before its copy was waited for"
            for page, part in _pairs(pages, source):
                page.copy_(part)

        return self._start(copy)

    def load(self, pages: list[Page], shape: torch.Size, dtype: torch.dtype) -> tuple[torch.Tensor, Moment]:
        x = torch.full(shape, torch.nan, dtype=dtype)
        held = weakref.ref(x)
        self.loaded += 1

        def copy() -> None:
            target = held()
            assert target is not None, "let go before its copy was waited for"
            for page, part in _pairs(pages, target):
                part.copy_(page)

        return x, self._start(copy)

    def wait(self, moment: Moment) -> None:
        self.waits += 1
        while self.made < moment.copies:
            self.late.pop(0)()
            self.made += 1
            self.clock_ms += self.copy_ms

    def now(self, *, copying: bool = False) -> Moment:
        return Moment(0, self.clock_ms)

    def milliseconds(self, begin: Moment, end: Moment) -> float:
        return end.time_ms - begin.time_ms

    def _start(self, copy: Callable[[], None]) -> Moment:
        self.clock_ms += self.layer_ms
        self.late.append(copy)
        return Moment(self.made + len(self.late))

    def _pin(self, nbytes: int) -> torch.Tensor:
        self.left -= nbytes
        return torch.empty(nbytes, dtype=torch.uint8)
