"""The kernel compiled for Hopper, which needs no GPU: 16 bytes a store, no shared memory, no fused multiply-add."""
# ruff: noqa: E402

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")
backends = pytest.importorskip("triton.backends.compiler")

from tests.kernels.dequantise.weights import quantised
from trl_turbo.kernels.dequantise import form
from trl_turbo.kernels.dequantise.kernel import dequantise_kernel as kernel

pytestmark = pytest.mark.skipif(not isinstance(kernel, triton.JITFunction), reason="Triton's interpreter is on")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def ptx(shape, *, dtype=torch.bfloat16, nested=True, blocksize=64, fused=False, **changed):
    """What the compiler makes of it for a weight whose tensors all lie at 16 bytes."""
    found = form.form(*quantised(shape, dtype, nested=nested, blocksize=blocksize))
    constants = dict(found.constants) | {"enable_fp_fusion": fused, "SHUFFLE": True} | changed
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    kinds = {"out_ptr": f"*{NAMES[dtype]}", "packed_ptr": "*u8", "absmax_ptr": "*u8" if nested else "*fp32", "n": "i32"}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: kinds.get(name, "*fp32") for name in names} | dict.fromkeys(constants, "constexpr")
    lie = [i for i, name in enumerate(names) if name != "n" or found.count % 16 == 0]
    source = compiler.ASTSource(
        kernel,
        {name: signature[name] for name in kernel.arg_names},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in lie},
    )
    return triton.compile(source, target=backends.GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def stores(text):
    return re.findall(r"\bst\.global\S*", text)


def fused_steps(text):
    return re.findall(r"\bfma\S*f32", text)


@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (64, 132)], ids=["even", "rest"])
def test_words_in_and_16_bytes_out(shape, dtype, nested):
    text = ptx(shape, dtype=dtype, nested=nested)
    assert stores(text) == ["st.global.v4.b32"] * 4
    assert "shared" not in text
    assert "bar.sync" not in text
    assert text.count("shfl.sync.idx") == 32
    assert not fused_steps(text)
    if shape == (64, 128):  # of a tensor with a rest, bytes are loaded one by one
        assert len(re.findall(r"ld\.global\.L1::evict_first\S*\.b32", text)) == 4


def test_other_dtypes_and_blocks_compile():
    assert stores(ptx((64, 128), dtype=torch.float32)) == ["st.global.v4.b32"] * 8
    for blocksize in (32, 4096):
        assert stores(ptx((64, 128), blocksize=blocksize)) == ["st.global.v4.b32"] * 4


def test_a_load_for_each_number_is_there_too():
    text = ptx((64, 128), SHUFFLE=False)
    assert "shfl" not in text
    assert stores(text) == ["st.global.v4.b32"] * 4


def test_control_fused_steps_and_narrow_stores_are_seen():
    assert fused_steps(ptx((64, 128), fused=True))
    assert set(stores(ptx((3, 7)))) == {"st.global.b16"}
