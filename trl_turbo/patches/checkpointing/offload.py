"""Layers' inputs on their way to the host and back: what is kept where, and in which order.

In forward an input is copied out as its layer starts, and let go on the device when the next one starts: by then the
copy has had a layer's time, and the device waits for what is left of it. In backward the input of the layer before is
on its way while a layer is made again. Nothing is rounded, and the host never waits. The last layer's input has not
been let go when backward starts, so it is never fetched.

What copies is a lane (`lane.Lane`); nothing here knows a device.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from trl_turbo.patches.checkpointing.cost import Costs
from trl_turbo.patches.checkpointing.lane import CudaLane, Lane, Page
from trl_turbo.report import note

#: Smaller inputs stay: what starts a copy costs more than they take.
SMALLEST_BYTES = 1 << 20


class Slot:
    """An input that was saved: in host memory, and on the device while it is on its way.

    Attributes:
        pages: Where its bytes are in host memory.
        shape: Its shape.
        dtype: Its dtype.
        device_copy: The tensor on the device, or what is being fetched into; `None` in between.
        arrives: When `device_copy` can be read; `None` where that is now.
        used: Whether backward has had it.
    """

    def __init__(self, offloader: Offloader, x: torch.Tensor, pages: list[Page], stored: Any) -> None:
        self.offloader = offloader
        self.pages = pages
        self.shape, self.dtype, self.nbytes = x.shape, x.dtype, x.nbytes
        self.device_copy: torch.Tensor | None = x
        self.stored = stored
        self.arrives: Any = None
        self.used = False
        self.before: weakref.ref[Slot] | None = None

    @property
    def pending(self) -> Any:
        """The moment from which `device_copy` can be read, if it was fetched, and let go."""
        return self.stored if self.arrives is None else self.arrives

    def __del__(self) -> None:
        # Its memory belongs to the computing stream, which may have it back once the copy has ended
        if self.device_copy is not None:
            self.offloader.lane.wait(self.pending)
        self.offloader.closed(self)


class Offloader:
    """Keeps the inputs of layers in host memory between forward and backward, on one device.

    Args:
        lane: Copies.
        smallest_bytes: What is smaller stays.
    """

    def __init__(self, lane: Lane, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.lane = lane
        self.costs = Costs(lane)
        self._smallest = smallest_bytes
        self._latest: weakref.ref[Slot] | None = None
        self._open = 0

    def pack(self, x: torch.Tensor) -> Slot | torch.Tensor:
        """What is kept in the place of a tensor that autograd saves."""
        if not self._fits(x):
            return x.detach()
        if self._open == 0:
            self.costs.begin(x.nbytes)
        if not self.costs.worth(x.nbytes):
            return x.detach()
        pages = self.lane.take(x.nbytes)
        if pages is None:
            note("checkpointing", "host memory is short: inputs of layers that do not fit into it stay on the device")
            return x.detach()
        kept = x.detach()
        slot = Slot(self, kept, pages, self.costs.timed_copy(lambda: self.lane.store(kept, pages)))
        self._open += 1
        previous = self._latest() if self._latest is not None else None
        if previous is not None:
            self._let_go(previous)
            slot.before = self._latest
        self._latest = weakref.ref(slot)
        return slot

    def unpack(self, kept: Slot | torch.Tensor) -> torch.Tensor:
        """The tensor again, on the device; the one that backward wants next is sent for."""
        if not isinstance(kept, Slot):
            return kept
        self.costs.wanted()
        if kept.device_copy is None:
            self._fetch(kept)
        x = kept.device_copy
        assert x is not None
        self.costs.timed_wait(kept.pending)
        kept.device_copy = kept.arrives = None
        kept.used = True
        before = kept.before() if kept.before is not None else None
        if before is not None and before.device_copy is None and not before.used:
            self._fetch(before)
        self.costs.reached()
        return x

    def closed(self, slot: Slot) -> None:
        """A slot is gone, with the graph that had it."""
        self._open -= 1
        self.lane.give_back(slot.pages)

    def _fits(self, x: torch.Tensor) -> bool:
        return (
            type(x) is torch.Tensor  # a parameter is where it is anyway
            and x.requires_grad  # masks and rotary tables are one for all layers
            and x.device == self.lane.device
            and x.is_contiguous()
            and x.nbytes >= max(self._smallest, 1)  # torch up to 2.12 saves an empty one beside the input
        )

    def _let_go(self, slot: Slot) -> None:
        """Forget the device's copy, for the computing stream to use its memory again."""
        if slot.device_copy is not None and slot.arrives is None and not slot.used:
            self.costs.timed_wait(slot.stored)
            slot.device_copy = None

    def _fetch(self, slot: Slot) -> None:
        slot.device_copy, slot.arrives = self.lane.load(slot.pages, slot.shape, slot.dtype)


_offloaders: dict[torch.device, Offloader] = {}


def has_device() -> bool:
    """Whether there is a device with memory of its own."""
    return torch.cuda.is_available()


def offloader_of(device: torch.device) -> Offloader | None:
    """The offloader of a device, `None` for one whose memory is the host's."""
    if device.type == "cuda" and device not in _offloaders and not torch.cuda.is_current_stream_capturing():
        _offloaders[device] = Offloader(CudaLane(device))
    return _offloaders.get(device)


def release() -> None:
    """Give pinned memory back as the last graphs that use it go."""
    _offloaders.clear()
