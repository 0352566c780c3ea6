"""Tensors of any strides as rows, for the kernels that go over rows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

#: Dtypes that the kernels take.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Row numbers are 32 bits wide in the kernels, and go a little beyond the last row
_MOST_ROWS = 1 << 30


def takes(*tensors: torch.Tensor) -> bool:
    """Whether kernels take these: on CUDA, with elements, of `DTYPES`; no subclasses, which have ways of their own."""
    return all(
        x.is_cuda and x.dtype in DTYPES and type(x) in (torch.Tensor, torch.nn.Parameter) and x.numel() > 0
        for x in tensors
    ) and all(x.numel() // x.shape[-1] < _MOST_ROWS for x in tensors)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, the stream being that one's current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
        leading = range(like.ndim - 1)
        self.order = sorted(leading, key=lambda i: (like.stride(i), like.shape[i]), reverse=True)
        self.count = like.shape[:-1].numel()

    def rows(self, x: torch.Tensor) -> Rows:
        """x [..., D] as rows, or its copy where its strides are odd."""
        return self.view(x) or Rows(self.ordered(x).contiguous(), self.count, 0, x.shape[-1])

    def view(self, x: torch.Tensor) -> Rows | None:
        """x [..., D] as rows without a copy, or `None`."""
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            return None
        levels: list[tuple[int, int]] = []  # sizes and strides, from the last
        for i in reversed(self.order):
            size, stride = x.shape[i], x.stride(i)
            if size == 1:
                continue
            if levels and stride == levels[-1][0] * levels[-1][1]:
                levels[-1] = (levels[-1][0] * size, levels[-1][1])
            else:
                levels.append((size, stride))
        if len(levels) > 2:
            return None
        inner, inner_stride = levels[0] if levels else (1, x.shape[-1])
        # One level: the quotient is 0, and so is its stride, which divides by whatever the loads want
        return Rows(x, inner, levels[1][1] if len(levels) == 2 else 0, inner_stride)

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D or 1] with its dimensions in this order."""
        return x.permute(*self.order, x.ndim - 1)

    def empty(self, like: torch.Tensor, dtype: torch.dtype, width: int | None = None) -> torch.Tensor:
        """A new tensor [..., D or `width`], dense, in this order in memory."""
        shape = [*(self.shape[i] for i in self.order), self.shape[-1] if width is None else width]
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return torch.empty(shape, dtype=dtype, device=like.device).permute(*back, len(self.order))
