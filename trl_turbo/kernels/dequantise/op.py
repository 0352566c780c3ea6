"""`Dequantiser`: the kernel where it takes a weight, and bitsandbytes' own function elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from .form import Form, form

#: Whether weights on CUDA are left to our kernel; where not, bitsandbytes' own function goes on being used.
KERNEL = True


class Dequantiser:
    """Gives one weight of bitsandbytes in 4 bits, nf4 or fp4, its scales quantised again or not.

    The numbers are those of `bitsandbytes.functional.dequantize_4bit` on CUDA to the bit, in one launch instead of
    three; but what that flushes to zero, below 2^-126, is kept.

    Args:
        packed: Bytes [N / 2], in any shape and storage dtype. Asked for its data at each call, as is `state`.
        state: Its `QuantState`.
    """

    def __init__(self, packed: torch.Tensor, state: Any) -> None:
        self._packed, self._state = packed, state
        self._form: Form | None = None

    def __call__(self, out: torch.Tensor) -> torch.Tensor:
        """Fill `out` with the weight, and give it back.

        Args:
            out: In the state's shape and dtype, on the weight's device.

        Raises:
            ValueError: It is not.
        """
        packed, state = self._packed.data, self._state  # no subclass, each question to which would cost a microsecond
        if packed.is_cuda and KERNEL:
            if self._form is not None and self._form.write(packed, state, out):
                return out
            self._form = form(packed, state)
            if self._form is not None and self._form.write(packed, state, out):
                return out
        return _stock(packed, state, out)


def _stock(packed: torch.Tensor, state: Any, out: torch.Tensor) -> torch.Tensor:
    if out.shape != tuple(state.shape) or out.dtype != state.dtype or out.device != packed.device:
        raise ValueError(
            f"A weight of shape {list(state.shape)} in {state.dtype} on {packed.device} does not go into a tensor of "
            f"shape {list(out.shape)} in {out.dtype} on {out.device}; pass one like it."
        )
    from bitsandbytes.functional import dequantize_4bit

    packed = packed.view(-1, 1)
    if out.is_cuda and out.is_contiguous():
        dequantize_4bit(packed, state, out=out)
        return out
    return out.copy_(dequantize_4bit(packed, state))  # bitsandbytes 0.50 writes into a given tensor on CUDA alone
