"""What a quantised weight is like, checked once: none is read but in the form that the kernel takes it to have."""

from __future__ import annotations

import functools
import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from trl_turbo.kernels.launching import launch
from trl_turbo.kernels.rows import DTYPES, on
from trl_turbo.kernels.sizes import ceil_div

from .reference import TABLES

#: Packed bytes of a program, and its warps: four loads of 4 bytes a thread, and four stores of 16 in 16 bits.
BYTES, WARPS = 2048, 4
#: Whether warps hold the table in their lanes, where NVIDIA's compiler is: for Hopper it makes 6.6 instructions of each
#: number then, and 10.3 of them where each is loaded from the table.
SHUFFLE = True
#: Packed bytes in a row of the kernel, of which none is in two blocks: those that 8 threads load.
_ROW = 32
_SMALLEST_BLOCK = 32
# Row numbers are 32 bits wide in the kernel, and go a little beyond the last row
_MOST_ROWS = 1 << 30

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class Form:
    """Of one weight: what a launch over it takes beside packed bytes and scales.

    Attributes:
        said: Shape, dtype, blocksize and kind, as its state has them.
        scales: Of its tensors of scales, which are not kept alive.
        device: Where they are.
        count: Numbers of the weight.
        programs: Of a launch.
        table: What nibbles stand for, [16].
        kernel: What is launched.
        constants: Its constants.
    """

    said: tuple[Any, ...]
    scales: tuple[weakref.ref[torch.Tensor], ...]
    device: torch.device
    count: int
    programs: int
    table: torch.Tensor
    kernel: Any
    constants: dict[str, Any]

    def write(self, packed: torch.Tensor, state: Any, out: torch.Tensor) -> bool:
        """Fill `out`, unless something is not, or no longer, of this form: then it is left alone, and the answer no.

        Args:
            packed: Bytes [N / 2], in any shape and storage dtype.
            state: Their `QuantState`.
            out: What to fill, in the state's shape and dtype.
        """
        tensors = tensors_of(state)
        if _said(state) != self.said:
            return False
        for ref, tensor in zip(self.scales, tensors, strict=True):
            if ref() is not tensor:
                return False
        if not (packed.is_contiguous() and out.is_contiguous()):
            return False
        if packed.dtype is not torch.uint8:
            packed = packed.view(torch.uint8)
        if packed.numel() != (self.count + 1) // 2 or out.shape != self.said[0] or out.dtype is not self.said[1]:
            return False
        if packed.device != self.device or out.device != self.device:
            return False
        with on(self.device):
            launch(self.kernel, self.programs, out, packed, self.table, *tensors, self.count, **self.constants)
        return True


def form(packed: torch.Tensor, state: Any) -> Form | None:
    """The form of a weight, or `None` where it is none that is known.

    Args:
        packed: Bytes [N / 2], in any shape and storage dtype.
        state: Their `QuantState`.
    """
    try:
        said, tensors = _said(state), tensors_of(state)
        shape, dtype, blocksize, kind, nested = said
        count, device = math.prod(shape), packed.device
        blocks = ceil_div(count, blocksize)
        known = kind in TABLES and dtype in DTYPES and _is_block(blocksize, _SMALLEST_BLOCK)
        known = known and count > 0 and count // _SMALLEST_BLOCK < _MOST_ROWS
        wanted = [(torch.float32, blocks)] * 4
        if nested:
            inner = state.state2
            known = known and _is_block(inner.blocksize, 1) and not inner.nested and inner.dtype == torch.float32
            wanted = [(torch.uint8, blocks), (torch.float32, ceil_div(blocks, inner.blocksize))]
            wanted += [(torch.float32, 256), (torch.float32, 1)]
    except (AttributeError, TypeError, ZeroDivisionError):  # a state of another kind
        return None
    if not known or getattr(state, "packing_format_for_cpu", False):
        return None
    for tensor, (kept, most) in zip(tensors, wanted, strict=True):
        if tensor.dtype != kept or tensor.numel() != most or tensor.device != device or not tensor.is_contiguous():
            return None
    try:
        from trl_turbo.kernels.linear_logprob.kernel_math import PTX

        from .kernel import dequantise_kernel
    except ImportError:  # torch builds without Triton (Windows)
        return None
    columns = min(_ROW, blocksize // 2)
    return Form(
        said,
        tuple(weakref.ref(tensor) for tensor in tensors),
        device,
        count,
        ceil_div(count, 2 * BYTES),
        _table(kind, device),
        dequantise_kernel,
        {
            "BLOCKSIZE": blocksize,
            "NESTED": state.state2.blocksize if nested else 0,
            "EVEN": count % (2 * BYTES) == 0,
            "ROWS": BYTES // columns,
            "COLUMNS": columns,
            "SHUFFLE": SHUFFLE and PTX.value,
            "num_warps": WARPS,
            "enable_fp_fusion": False,
        },
    )


def tensors_of(state: Any) -> Tensors:
    """Scales, scales of scales, their table and their offset; where scales are not quantised they stand for all."""
    scales = state.absmax
    inner = state.state2
    return (scales,) * 4 if inner is None else (scales, inner.absmax, inner.code, state.offset)


def _said(state: Any) -> tuple[Any, ...]:
    return state.shape, state.dtype, state.blocksize, state.quant_type, state.nested


def _is_block(size: Any, least: int) -> bool:
    return isinstance(size, int) and size >= least and size & (size - 1) == 0


@functools.cache
def _table(kind: str, device: torch.device) -> torch.Tensor:
    return torch.tensor(TABLES[kind], device=device)
