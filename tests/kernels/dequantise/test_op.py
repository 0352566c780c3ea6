"""Which weights the kernel takes, and that all others are bitsandbytes' own; on any machine."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.kernels.dequantise.weights import bitsandbytes, quantised
from trl_turbo.kernels.dequantise import Dequantiser, form, op
from trl_turbo.kernels.dequantise.reference import TABLES, dequantise_reference

pytest.importorskip("triton")
needs_bitsandbytes = pytest.mark.skipif(bitsandbytes is None, reason="bitsandbytes is not installed")


def half(state):
    state.absmax = state.absmax.half()


def short(state):
    state.absmax = state.absmax[:-1]


def strided(state):
    state.absmax = state.absmax.repeat_interleave(2)[::2]


def nested_twice(state):
    state.state2.nested = True


def wide_offset(state):
    state.offset = state.offset.double()


def scales_in_16_bits(state):
    state.state2.dtype = torch.float16


def odd_blocks(state):
    state.blocksize = 48


def small_blocks(state):
    state.blocksize = 16


def another_kind(state):
    state.quant_type = "af4"


def no_shape(state):
    state.shape = None


def packed_for_the_cpu(state):
    state.packing_format_for_cpu = True


NESTED = [nested_twice, wide_offset, scales_in_16_bits]
ANY = [half, short, strided, odd_blocks, small_blocks, another_kind, no_shape, packed_for_the_cpu]


@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("change", [*ANY, *NESTED], ids=lambda change: change.__name__)
def test_states_of_other_forms_are_not_taken(change, nested):
    packed, state = quantised((40, 96), torch.float32, nested=nested)
    assert form.form(packed, state) is not None
    if nested or change in ANY:
        change(state)
        assert form.form(packed, state) is None


@pytest.mark.parametrize("what", ["short", "strided", "of another shape", "in another dtype", "on another device"])
def test_what_does_not_fit_is_not_written(what):
    packed, state = quantised((40, 96), torch.float16)
    known = form.form(packed, state)
    out = torch.full((40, 96), 7.0, dtype=torch.float16)
    if what == "short":
        packed = packed[:-1]
    elif what == "strided":
        packed = packed.repeat(1, 2)[:, :1]
    elif what == "of another shape":
        out = out.view(96, 40)
    elif what == "in another dtype":
        out = out.bfloat16()
    else:
        out = out.to("meta")
    assert not known.write(packed, state, out)
    assert what == "on another device" or (out == 7).all()


@pytest.mark.parametrize("change", ["absmax", "offset", "inner", "dtype"])
def test_a_state_that_changes_is_looked_at_again(change):
    packed, state = quantised((40, 96), torch.float16)
    known = form.form(packed, state)
    if change == "absmax":
        state.absmax = state.absmax.clone()
    elif change == "offset":
        state.offset = state.offset.clone()
    elif change == "inner":
        state.state2.code = state.state2.code.clone()
    else:
        state.dtype = torch.float32
    assert not known.write(packed, state, torch.empty(40, 96, dtype=state.dtype))


def test_a_form_keeps_no_scales():
    packed, state = quantised((40, 96), torch.float16)
    known = form.form(packed, state)
    state.absmax = state.absmax.clone()
    assert known.scales[0]() is None


def test_where_triton_is_missing_none_is_taken(monkeypatch):
    weight = quantised((40, 96), torch.float16)
    assert form.form(*weight) is not None
    monkeypatch.setitem(sys.modules, "trl_turbo.kernels.dequantise.kernel", None)
    assert form.form(*weight) is None


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_without_a_kernel_it_is_bitsandbytes(kind, dtype):
    packed, state = quantised((40, 128), dtype, kind=kind)
    dequantise = Dequantiser(torch.nn.Parameter(packed, requires_grad=False), state)
    out = torch.full((40, 128), torch.nan, dtype=dtype)
    assert dequantise(out) is out
    assert torch.equal(out, bitsandbytes.dequantize_4bit(packed, state))
    assert torch.equal(out, dequantise_reference(packed, state))
    strided = torch.full((40, 256), torch.nan, dtype=dtype)[:, ::2]
    assert torch.equal(dequantise(strided), out)


@pytest.mark.parametrize("out", [torch.empty(96, 40), torch.empty(40, 96, dtype=torch.float16)], ids=["shape", "dtype"])
def test_a_tensor_that_does_not_fit_raises(out):
    with pytest.raises(ValueError, match="does not go into a tensor of shape"):
        Dequantiser(*quantised((40, 96), torch.float32))(out)


def test_on_by_default():
    assert op.KERNEL


@needs_bitsandbytes
@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_those_of_bitsandbytes(kind):
    table = torch.tensor(TABLES[kind])
    assert torch.equal(table, bitsandbytes.get_4bit_type(kind, device="cpu"))
    assert table.signbit().sum() == (8 if kind == "fp4" else 7)  # -0 is there, as in its CUDA kernel
