"""Tensors of any strides as rows, for the kernels that go over rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

#: Dtypes that the kernels take.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Row numbers are 32 bits wide in the kernels, and go a little beyond the last row
_MOST_ROWS = 1 << 30
_HERE = nullcontext()
_PLAIN = (torch.Tensor, torch.nn.Parameter)

#: `torch.cuda.current_device` without asking first whether CUDA has begun: where there is a tensor on it, it has.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def takes(*tensors: torch.Tensor) -> bool:
    """Whether kernels take these: on CUDA, with elements, of `DTYPES`; no subclasses, which have ways of their own."""
    for x in tensors:
        if not x.is_cuda or x.dtype not in DTYPES or type(x) not in _PLAIN:
            return False
        count = x.numel()
        if count == 0 or count // x.shape[-1] >= _MOST_ROWS:
            return False
    return True


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, the stream being that one's current one."""
    if device.type != "cuda" or device.index == current_device():
        return _HERE
    return torch.cuda.device(device)


@functools.cache
def processors(device: torch.device) -> int:
    """How many there are; few where there is only the interpreter, so that work is split there as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


class Rows(NamedTuple):
    """A tensor [..., D] as N rows, row r starting at (r // inner) * outer_stride + (r % inner) * inner_stride.

    Two strides serve slices of a fused projection and transposed heads.
    """

    tensor: torch.Tensor
    inner: int
    outer_stride: int
    inner_stride: int

    @property
    def dense(self) -> bool:
        """Whether row follows row without a gap."""
        return self.outer_stride == 0 and self.inner_stride == self.tensor.shape[-1]


class Order:
    """The order in which the rows of tensors of one shape are gone through: that in which `like` has them in memory.

    Args:
        like: [..., D].
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.shape = like.shape
        self.count = like.shape[:-1].numel()
        self.order, self.back = _order(like.shape, like.stride())
        self.straight = self.order == self.back == tuple(range(len(self.order)))

    def rows(self, x: torch.Tensor) -> Rows:
        """x [..., D] as rows, or its copy where its strides are odd."""
        return self.view(x) or Rows(self.ordered(x).contiguous(), self.count, 0, x.shape[-1])

    def view(self, x: torch.Tensor) -> Rows | None:
        """x [..., D] as rows without a copy, or `None`."""
        levels = _levels(x.shape, x.stride(), self.order)
        return None if levels is None else Rows(x, *levels)

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D or 1] with its dimensions in this order."""
        return x if self.straight else x.permute(*self.order, x.ndim - 1)

    def empty(self, like: torch.Tensor, dtype: torch.dtype, width: int | None = None) -> torch.Tensor:
        """A new tensor [..., D or `width`], dense, in this order in memory."""
        columns = self.shape[-1] if width is None else width
        if self.straight:
            return torch.empty((*self.shape[:-1], columns), dtype=dtype, device=like.device)
        new = torch.empty((*(self.shape[i] for i in self.order), columns), dtype=dtype, device=like.device)
        return new.permute(*self.back, len(self.order))


# A layer's shapes come again in each layer and step: found once, they cost a look-up instead of some 50 us in Python
@functools.lru_cache(4096)
def _order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Leading dimensions from the widest stride to the narrowest, and the permutation back."""
    order = sorted(range(len(shape) - 1), key=lambda i: (strides[i], shape[i]), reverse=True)
    return tuple(order), tuple(sorted(range(len(order)), key=order.__getitem__))


@functools.lru_cache(4096)
def _levels(shape: tuple[int, ...], strides: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, int, int] | None:
    """`inner`, `outer_stride` and `inner_stride` of `Rows`, or `None` where two strides do not do."""
    if strides[-1] != 1 and shape[-1] != 1:
        return None
    levels: list[tuple[int, int]] = []  # sizes and strides, from the last
    for i in reversed(order):
        size, stride = shape[i], strides[i]
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    inner, inner_stride = levels[0] if levels else (1, shape[-1])
    # One level: the quotient is 0, and so is its stride, which divides by whatever the loads want
    return inner, levels[1][1] if len(levels) == 2 else 0, inner_stride
