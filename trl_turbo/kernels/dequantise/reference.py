"""What nibbles stand for, and plain torch that says what each number is, rounded as bitsandbytes rounds it on CUDA."""

from __future__ import annotations

from typing import Any

import torch

_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
#: What a nibble stands for, as a share of its block's largest magnitude. nf4: https://arxiv.org/abs/2305.14314, table
#: of appendix E; fp4: sign, two bits of exponent and one of mantissa, over 12. These are the tables of bitsandbytes'
#: CUDA kernels, which do not read `QuantState.code`; there fp4's ninth is -0, and +0 in `code`.
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": (*_FP4, *(-value for value in _FP4)),
}


def dequantise_reference(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """The weight, each product and sum rounded to float32 and the result to the state's dtype.

    Args:
        packed: Bytes, the first of two numbers in the upper half; contiguous, of any storage dtype.
        state: Its `QuantState`.

    Returns:
        `state.shape`, `state.dtype`.
    """
    n = state.shape.numel()
    pairs = packed.reshape(-1).view(torch.uint8).int()
    nibbles = torch.stack((pairs >> 4, pairs & 15), dim=1).view(-1)[:n]
    scales = state.absmax
    if state.nested:
        inner = state.state2
        scales = (
            inner.code[scales.int()] * inner.absmax.repeat_interleave(inner.blocksize)[: len(scales)] + state.offset
        )
    table = torch.tensor(TABLES[state.quant_type], device=packed.device)
    numbers = table[nibbles] * scales.repeat_interleave(state.blocksize)[:n]
    return numbers.to(state.dtype).view(state.shape)
