"""The offloader against plain checkpointing, to the bit, over a lane that copies no sooner than it must."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import trl_turbo
from trl_turbo.patches.checkpointing.cost import LARGEST_SHARE
from trl_turbo.patches.checkpointing.lane import PAGE_BYTES, SLAB_BYTES, SPARE_BYTES, Pages
from trl_turbo.patches.checkpointing.offload import Offloader, Slot

from .lanes import LateLane

LAYERS, WIDTH = 5, 16


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    trl_turbo.unpatch()


def layers(dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)).to(dtype)


def inputs(rows: int = 7, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(dtype).requires_grad_()


def forward(stack: nn.ModuleList, x: torch.Tensor, offloader: Offloader | None, reentrant: bool) -> torch.Tensor:
    def hooks() -> Any:
        return saved_tensors_hooks(offloader.pack, offloader.unpack) if offloader else nullcontext()

    for layer in stack:
        with hooks():
            x = checkpoint(layer, x, use_reentrant=reentrant)
    return x


def gradients(stack: nn.ModuleList, x: torch.Tensor) -> list[torch.Tensor]:
    found = [x.grad.clone(), *(p.grad.clone() for p in stack.parameters())]
    for tensor in (x, *stack.parameters()):
        tensor.grad = None
    return found


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_of_plain_checkpointing(reentrant: bool, dtype: torch.dtype) -> None:
    stack, x, lane = layers(dtype), inputs(dtype=dtype), LateLane()
    offloader = Offloader(lane, smallest_bytes=0)
    forward(stack, x, None, reentrant).square().sum().backward()
    expected = gradients(stack, x)
    for step in range(1, 4):
        out = forward(stack, x, offloader, reentrant)
        out.square().sum().backward()
        del out
        assert_equal(gradients(stack, x), expected)
        # The last layer's input has not been let go when backward starts
        assert (lane.stored, lane.loaded) == (step * LAYERS, step * (LAYERS - 1))
    assert lane.grown == 1
    assert len(lane.pages._free) == SLAB_BYTES // PAGE_BYTES


def test_one_input_is_on_the_device_and_one_on_its_way() -> None:
    stack, x, lane = layers(), inputs(), LateLane()
    offloader = Offloader(lane, smallest_bytes=0)
    slots: list[Slot] = []

    def pack(tensor: torch.Tensor) -> Any:
        kept = offloader.pack(tensor)
        if isinstance(kept, torch.Tensor):  # what torch saves beside it
            return kept
        slots.append(kept)
        assert sum(slot.device_copy is not None for slot in slots) == 1
        return kept

    most = 0

    def unpack(kept: Any) -> torch.Tensor:
        nonlocal most
        x = offloader.unpack(kept)
        most = max(most, 1 + sum(slot.device_copy is not None for slot in slots))
        return x

    y = x
    for layer in stack:
        with saved_tensors_hooks(pack, unpack):
            y = checkpoint(layer, y, use_reentrant=False)
    y.sum().backward()
    assert most == 2


def test_several_forwards_before_one_backward() -> None:
    stack, offloader = layers(), Offloader(LateLane(), smallest_bytes=0)
    chunks = [inputs(rows) for rows in (3, 7, 5)]

    def grads(using: Offloader | None) -> list[torch.Tensor]:
        torch.stack([forward(stack, x, using, False).square().sum() for x in chunks]).sum().backward()
        return [*gradients(stack, chunks[0]), *(x.grad.clone() for x in chunks[1:])]

    expected = grads(None)
    for x in chunks:
        x.grad = None
    assert_equal(grads(offloader), expected)


def test_backward_twice_over_one_graph() -> None:
    stack, x, offloader = layers(), inputs(), Offloader(LateLane(), smallest_bytes=0)
    forward(stack, x, None, True).square().sum().backward()
    expected = gradients(stack, x)
    loss = forward(stack, x, offloader, True).square().sum()
    loss.backward(retain_graph=True)
    assert_equal(gradients(stack, x), expected)
    loss.backward()
    assert_equal(gradients(stack, x), expected)


def test_a_graph_that_is_dropped_gives_its_pages_back() -> None:
    stack, x, lane = layers(), inputs(), LateLane()
    offloader = Offloader(lane, smallest_bytes=0)
    out = forward(stack, x, offloader, False)
    assert len(lane.pages._free) == SLAB_BYTES // PAGE_BYTES - LAYERS
    del out
    assert len(lane.pages._free) == SLAB_BYTES // PAGE_BYTES


def test_a_backward_that_fails_waits_for_what_is_on_its_way() -> None:
    stack, x, lane = layers(), inputs(), LateLane()
    offloader = Offloader(lane, smallest_bytes=0)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no more")

    y = Fails.apply(forward(stack[:3], x, offloader, False))
    y = forward(stack[3:], y, offloader, False)
    with pytest.raises(RuntimeError, match="no more"):
        y.sum().backward()
    assert lane.loaded == 2  # of layers 3 and 2, which was to come next
    del y
    for p in stack.parameters():
        p.grad = None
    assert len(lane.pages._free) == SLAB_BYTES // PAGE_BYTES
    forward(stack, x, None, False).square().sum().backward()
    expected = gradients(stack, x)
    forward(stack, x, offloader, False).square().sum().backward()
    assert_equal(gradients(stack, x), expected)


def test_what_is_shared_or_small_stays() -> None:
    lane = LateLane()
    offloader = Offloader(lane, smallest_bytes=64)
    for x in (
        torch.ones(100),  # a mask
        nn.Parameter(torch.ones(100)),
        torch.ones(4, requires_grad=True),
        torch.ones(100, 2, requires_grad=True).t(),
    ):
        kept = offloader.pack(x)
        assert isinstance(kept, torch.Tensor)
        assert offloader.unpack(kept).data_ptr() == x.data_ptr()
    assert lane.stored == 0
    assert isinstance(Offloader(lane, 0).pack(torch.empty(0, requires_grad=True)), torch.Tensor)
    assert isinstance(offloader.pack(torch.ones(100, requires_grad=True) * 1), Slot)


def test_short_host_memory_keeps_the_rest_on_the_device() -> None:
    report = trl_turbo.patch(verbose=False)
    stack, lane = layers(), LateLane(left=SPARE_BYTES + SLAB_BYTES)
    x = inputs(rows=2 * PAGE_BYTES // (4 * WIDTH))  # two of the eight pages each: four of five inputs fit
    forward(stack, x, None, False).square().sum().backward()
    expected = gradients(stack, x)
    forward(stack, x, Offloader(lane, 0), False).square().sum().backward()
    assert_equal(gradients(stack, x), expected)
    assert lane.stored == 4 < LAYERS
    assert [note.text for note in report.notes if "host memory is short" in note.text]


def test_pages_stop_where_others_need_the_memory() -> None:
    total = 64 << 30
    pages = Pages(lambda n: torch.empty(n, dtype=torch.uint8, device="meta"), lambda: (total // 8 + SLAB_BYTES, total))
    assert len(pages.take(3 * PAGE_BYTES + 1) or []) == 4
    assert pages.take(0) == []
    assert len(pages._free) == SLAB_BYTES // PAGE_BYTES - 4
    low = Pages(lambda n: torch.empty(n, dtype=torch.uint8, device="meta"), lambda: (total // 8, total))
    assert low.take(1) is None


@pytest.mark.parametrize(("copy_ms", "kept"), [(0.0, False), (10.0, True)])
@pytest.mark.parametrize("between_ms", [0.0, 1e6], ids=["at-once", "later"])
def test_copies_that_the_device_waits_for_are_given_up(copy_ms: float, kept: bool, between_ms: float) -> None:
    """What happens between forward and backward, a reward function for one, is not counted as theirs."""
    report = trl_turbo.patch(verbose=False)
    stack, x, lane = layers(), inputs(), LateLane(copy_ms=copy_ms)
    offloader = Offloader(lane, smallest_bytes=0)
    forward(stack, x, None, False).square().sum().backward()
    expected = gradients(stack, x)
    for _ in range(4):
        loss = forward(stack, x, offloader, False).square().sum()
        lane.clock_ms += between_ms
        loss.backward()
        assert_equal(gradients(stack, x), expected)
    # The first pass pins memory and is not judged; the second is
    assert lane.stored == (2 if kept else 4) * LAYERS
    (text,) = [note.text for note in report.notes if "waited" in note.text]
    assert ("stay on the device" in text) == kept
    assert 0 < LARGEST_SHARE < 0.1
