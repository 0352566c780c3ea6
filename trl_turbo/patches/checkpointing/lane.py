"""Copies between a device and pinned host memory, beside what the device computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

#: Inputs are cut into pages, so that those of sequences of any length use the same memory again.
PAGE_BYTES = 8 << 20
#: Pinned at once: torch rounds pinned memory up to a power of two, and pinning costs the host a call.
SLAB_BYTES = 64 << 20
#: Left to everybody else on the host.
SPARE_BYTES = 4 << 30
SPARE_SHARE = 1 / 8

Page = torch.Tensor


class Lane(Protocol):
    """What the offloader needs of a device. A moment is opaque: it can be waited for, and two have a time between."""

    device: torch.device

    def take(self, nbytes: int) -> list[Page] | None:
        """Pages for so many bytes; `None` where host memory is short."""

    def give_back(self, pages: list[Page]) -> None:
        """Let others use pages, once what was started with them has ended."""

    def store(self, x: torch.Tensor, pages: list[Page]) -> Any:
        """Start copying x out, behind what computes it; returns the moment when it is done."""

    def load(self, pages: list[Page], shape: torch.Size, dtype: torch.dtype) -> tuple[torch.Tensor, Any]:
        """Start copying into a new tensor; returns it, and the moment from which it can be read."""

    def wait(self, moment: Any) -> None:
        """Let what is computed from here on wait for a moment."""

    def now(self, *, copying: bool = False) -> Any:
        """This moment of what computes, or of what copies, for `milliseconds`."""

    def milliseconds(self, begin: Any, end: Any) -> float | None:
        """The time between two moments; `None` while the second is not reached."""

    @property
    def grown(self) -> int:
        """How often memory was pinned so far."""


class Pages:
    """Pinned pages that are used again.

    Args:
        pin: Makes a slab of so many bytes.
        available: Bytes that the host can give, and its size.
    """

    def __init__(self, pin: Callable[[int], torch.Tensor], available: Callable[[], tuple[int, int]]) -> None:
        self._pin, self._available = pin, available
        self._free: list[Page] = []
        self.slabs = 0

    def take(self, nbytes: int) -> list[Page] | None:
        """Pages for so many bytes, the last one in part; `None` where there are not so many."""
        count = -(-nbytes // PAGE_BYTES)
        while len(self._free) < count:
            left, total = self._available()
            if left - SLAB_BYTES < max(SPARE_BYTES, int(SPARE_SHARE * total)):
                return None
            try:
                slab = self._pin(SLAB_BYTES)
            except RuntimeError:  # the driver pins no more
                return None
            self.slabs += 1
            self._free += slab.split(PAGE_BYTES)
        taken = self._free[:count]
        del self._free[:count]
        return taken

    def give_back(self, pages: list[Page]) -> None:
        """Use pages again."""
        self._free += pages


class CudaLane:
    """One side stream of one GPU: copies on it are in order, so that a page may be written again at once.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pages = Pages(lambda n: torch.empty(n, dtype=torch.uint8, pin_memory=True), host_memory)

    @property
    def grown(self) -> int:
        """How often memory was pinned."""
        return self._pages.slabs

    def take(self, nbytes: int) -> list[Page] | None:
        """Pinned pages."""
        return self._pages.take(nbytes)

    def give_back(self, pages: list[Page]) -> None:
        """Use pages again."""
        self._pages.give_back(pages)

    def store(self, x: torch.Tensor, pages: list[Page]) -> torch.cuda.Event:
        """Copy out on the side stream. The caller keeps x until it has waited for the event."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for page, part in _pairs(pages, x):
                page.copy_(part, non_blocking=True)
        return self._event(self._stream)

    def load(self, pages: list[Page], shape: torch.Size, dtype: torch.dtype) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Copy in on the side stream, into memory of the computing stream, which frees it after it has waited."""
        with torch.no_grad():
            x = torch.empty(shape, dtype=dtype, device=self.device)
            # What had this memory before was freed in the computing stream and may still be read there
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                for page, part in _pairs(pages, x):
                    part.copy_(page, non_blocking=True)
        return x, self._event(self._stream)

    def wait(self, moment: torch.cuda.Event) -> None:
        """Let the computing stream wait."""
        torch.cuda.current_stream(self.device).wait_event(moment)

    def now(self, *, copying: bool = False) -> torch.cuda.Event:
        """An event with a time."""
        return self._event(self._stream if copying else torch.cuda.current_stream(self.device), timed=True)

    def milliseconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        """The time between two events, without waiting for them."""
        return float(begin.elapsed_time(end)) if begin.query() and end.query() else None

    def _event(self, stream: torch.cuda.Stream, *, timed: bool = False) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=timed)
        event.record(stream)
        return event


def _pairs(pages: list[Page], x: torch.Tensor) -> Iterator[tuple[Page, torch.Tensor]]:
    """The pages, and the bytes of a contiguous x that go into each."""
    for page, part in zip(pages, x.view(-1).view(torch.uint8).split(PAGE_BYTES), strict=True):
        yield page[: len(part)], part


def host_memory() -> tuple[int, int]:
    """Bytes that this process may still take, and all there are, a container's limit included."""
    import psutil

    memory = psutil.virtual_memory()
    left, total = int(memory.available), int(memory.total)
    for limit_file, used_file, stat_file in _CGROUPS:
        limit, used = _number(limit_file), _number(used_file)
        if limit is not None and used is not None and limit < total:
            left, total = min(left, limit - used + _reclaimable(stat_file)), limit
    return left, total


_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def _number(path: str) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _reclaimable(path: str) -> int:
    """Files that the kernel keeps in memory while nobody needs it."""
    words = (line.split() for line in _text(path).splitlines())
    return next((int(w[1]) for w in words if w[0] in ("inactive_file", "total_inactive_file")), 0)


def _text(path: str) -> str:
    if not os.path.exists(path):
        return ""
    with open(path) as file:
        return file.read()
