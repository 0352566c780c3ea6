"""Weights in 4 bits: as bitsandbytes quantises them, or where it is missing, of the same form and made of noise."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from trl_turbo.kernels.dequantise import form

try:
    from bitsandbytes import functional as bitsandbytes
except ImportError:
    bitsandbytes = None


def quantised(shape, dtype, *, kind="nf4", nested=True, blocksize=64, device="cpu", storage=torch.uint8):
    """Packed bytes and their `QuantState`."""
    g = torch.Generator().manual_seed(0)
    if bitsandbytes is not None:
        weight = torch.randn(shape, generator=g).to(device, dtype)
        options = {"blocksize": blocksize, "quant_type": kind, "compress_statistics": nested}
        return bitsandbytes.quantize_4bit(weight, **options, quant_storage=storage)
    n = math.prod(shape)
    packed = torch.randint(256, (-(-n // 2), 1), generator=g, dtype=torch.uint8).to(device)
    blocks = -(-n // blocksize)
    absmax, inner, offset = torch.rand(blocks, generator=g).to(device) + 0.5, None, None
    if nested:
        scales = torch.rand(-(-blocks // 256), generator=g).to(device)
        code = torch.linspace(-1, 1, 256, device=device)
        inner = SimpleNamespace(absmax=scales, code=code, blocksize=256, dtype=torch.float32, nested=False)
        absmax = torch.randint(256, (blocks,), generator=g, dtype=torch.uint8).to(device)
        offset = torch.tensor(1.7, device=device)
    said = {"shape": torch.Size(shape), "dtype": dtype, "blocksize": blocksize, "quant_type": kind, "nested": nested}
    state = SimpleNamespace(absmax=absmax, state2=inner, offset=offset, **said)
    return packed.view(-1).view(storage).view(-1, 1), state


def by_kernel(packed, state):
    """The weight, out of a tensor of NaN; packed bytes and scales are checked unchanged."""
    found = form.form(packed, state)
    assert found is not None
    out = torch.full(tuple(state.shape), torch.nan, dtype=state.dtype, device=packed.device)
    inputs = (packed, *form.tensors_of(state))
    before = [x.clone() for x in inputs]
    assert found.write(packed, state, out)
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(inputs, before, strict=True))
    return out


def bits(x):
    """Every bit of it: -0 is not 0."""
    return x.reshape(-1).view(torch.uint8)
