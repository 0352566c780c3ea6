"""The Triton kernel against bitsandbytes and plain torch, to the bit, run by `tests/kernels/test_triton.py` alone."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.kernels.dequantise.weights import bits, bitsandbytes, by_kernel, quantised
from trl_turbo.kernels.dequantise import form, reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter computes bf16 wrongly
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_kind = pytest.mark.parametrize("kind", ["nf4", "fp4"])
each_nested = pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
#: Less than a byte, less than a block, as many as a program's 4,096, a rest of some, and an odd one
SHAPES = [(1, 1), (3, 7), (64, 64), (33, 130), (33, 129)]


@pytest.fixture(params=[True, False] if CUDA else [False], ids=lambda on: "shuffled" if on else "loaded", autouse=True)
def lookup(request, monkeypatch):
    monkeypatch.setattr(form, "SHUFFLE", request.param)


def check(packed, state):
    found = by_kernel(packed, state)
    assert torch.equal(bits(found), bits(reference.dequantise_reference(packed, state)))
    if bitsandbytes is None:
        return found
    # As one row: on CPUs with AVX-512, bitsandbytes 0.50 scales rows of an odd multiple of 32 by other rows' blocks
    row = copy.copy(state)
    row.shape = torch.Size([found.numel()])
    with torch.compiler.set_stance("force_eager"):  # what it has for odd rows would be compiled for each shape
        assert torch.equal(found.view(-1), bitsandbytes.dequantize_4bit(packed, row).view(-1))
    return found


@each_kind
@each_nested
@each_dtype
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
def test_as_bitsandbytes(blocksize, dtype, nested, kind):
    for shape in SHAPES:
        check(*quantised(shape, dtype, kind=kind, nested=nested, blocksize=blocksize, device=DEVICE))


@each_dtype
def test_scales_in_several_blocks(dtype):
    packed, state = quantised((4, 8_300), dtype, device=DEVICE)
    assert state.state2.absmax.numel() == 3
    check(packed, state)


@each_kind
def test_every_nibble_in_either_half(kind):
    packed, state = quantised((16, 32), torch.float32, kind=kind, nested=False, device=DEVICE)
    packed.copy_(torch.arange(256, dtype=torch.uint8, device=DEVICE).view(-1, 1))
    found = check(packed, state)
    assert len(found[:2].unique()) == 16 - (kind == "fp4")  # which has a zero of either sign
    if kind == "fp4":
        assert (found == 0).sum() == 64
        assert (torch.signbit(found) & (found == 0)).sum() == 32


@each_dtype
def test_scales_at_the_ends(dtype):
    packed, state = quantised((5, 640), dtype, nested=False, device=DEVICE)
    state.absmax[:6] = torch.tensor([torch.inf, torch.nan, 0.0, 3e38, 65504.0, 1e-5])
    found, wanted = by_kernel(packed, state), reference.dequantise_reference(packed, state)
    assert found.isnan().any()
    assert found.isinf().any()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(bits(found.nan_to_num()), bits(wanted.nan_to_num()))


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_storage_of_another_dtype(storage):
    packed, state = quantised((40, 96), torch.float16, storage=storage, device=DEVICE)
    assert packed.dtype == storage
    check(packed, state)


@pytest.mark.parametrize("size", [1, 16, 4096])
def test_blocks_of_scales_of_other_sizes(size):
    packed, state = quantised((40, 330), torch.float32, device=DEVICE)
    inner = state.state2
    inner.blocksize = size
    inner.absmax = inner.absmax.new_tensor([0.3, 0.7, 1.1]).repeat(70)[: -(-state.absmax.numel() // size)].contiguous()
    found = by_kernel(packed, state)
    assert torch.equal(bits(found), bits(reference.dequantise_reference(packed, state)))


def test_control_sum_of_a_scale_is_rounded_twice():
    """With one rounding for product and sum, numbers differ: that there is no fused step is seen by these tests."""
    packed, state = quantised((64, 640), torch.float32, device=DEVICE)
    found = check(packed, state)
    inner = state.state2
    exact = inner.code[state.absmax.int()].double() * inner.absmax.repeat_interleave(256)[: state.absmax.numel()]
    state.absmax, state.state2, state.nested = (exact + state.offset).float(), None, False
    assert not torch.equal(found, reference.dequantise_reference(packed, state))


@pytest.mark.parametrize("wrong", ["nibbles", "offset", "block"])
def test_control_planted_errors_are_seen(wrong):
    packed, state = quantised((64, 64), torch.float16, device=DEVICE)
    wanted = reference.dequantise_reference(packed, state)
    if wrong == "nibbles":
        packed = (packed >> 4) | (packed << 4)
    elif wrong == "offset":
        state.offset = state.offset * (1 + 2**-9)
    else:
        state.absmax = state.absmax.flip(0)
    assert not torch.equal(by_kernel(packed, state), wanted)
