"""Norms, rotary embedding and gated product compiled for Hopper, which needs no GPU: 16 bytes a load and store."""
# ruff: noqa: E402

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")
backends = pytest.importorskip("triton.backends.compiler")

from trl_turbo.kernels.gated import ACTIVATIONS
from trl_turbo.kernels.gated import kernel as gated
from trl_turbo.kernels.gated import passes as gated_passes
from trl_turbo.kernels.rms_norm import kernel as norm
from trl_turbo.kernels.rms_norm import passes as norm_passes
from trl_turbo.kernels.rope import kernel as rope

pytestmark = pytest.mark.skipif(
    not isinstance(norm.forward_kernel, triton.JITFunction), reason="Triton's interpreter is on"
)
SCALARS = {"eps": "fp32", "offset": "fp32"}
WIDE = ("rstd_ptr", "partial_ptr")


def ptx(kernel, warps, aligned=True, **constants):
    """What the compiler makes of it for tensors in bf16 that lie at 16 bytes, as do their rows."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = "*fp32" if name in WIDE else "*bf16"
        signature[name] = pointer if name.endswith("_ptr") else SCALARS.get(name, "i32")
        if aligned and name.endswith(("_ptr", "_outer", "_stride", "_batch", "_head", "_token", "columns")):
            attributes[i,] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = compiler.ASTSource(kernel, signature, places, attributes)
    target = backends.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]


def narrow(text):
    """Loads and stores of less than 16 bytes a thread."""
    found = re.findall(r"\b(?:ld|st)\.global\S*\.[bfu]\d+", text)
    assert found
    return [one for one in found if ".v4.b32" not in one]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("width", [128, 1536, 4096])
def test_norms(width, add):
    tile = norm.plan(width, norm_passes.TILE)
    shape = {"D": width, "ROWS": tile.rows, "BLOCK": tile.block, "IN_FLOAT32": False, "ADD": add}
    # 1 / rms of a row is 4 bytes; a head's weight is shorter than a warp
    assert len(narrow(ptx(norm.forward_kernel, tile.warps, **shape))) <= 1 + (width == 128)
    text = ptx(norm.backward_kernel, tile.warps, WEIGHT=False, STAGES=1, **shape)
    assert len(narrow(text)) <= tile.rows + (width == 128)


def test_tiles_of_a_trained_norm_are_loaded_ahead():
    tile = norm.plan(1536, norm_passes.SUM_TILE)
    shape = {"D": 1536, "ROWS": tile.rows, "BLOCK": tile.block, "IN_FLOAT32": False, "ADD": False, "WEIGHT": True}
    assert "cp.async" in ptx(norm.backward_kernel, tile.warps, STAGES=3, **shape)
    assert "cp.async" not in ptx(norm.backward_kernel, tile.warps, STAGES=1, **shape)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "k_heads"), [(12, 2), (32, 8)])
def test_rope(heads, k_heads, interleaved):
    shape = {"Q_HEADS": heads, "HEADS": heads + k_heads, "D": 128, "R": 128, "HALF": 64, "REST": 0}
    shape |= {"TILE_HEADS": 16, "INTERLEAVED": interleaved, "BACK": False}
    # A token's angles, interleaved, are 128 numbers for 128 threads
    assert len(narrow(ptx(rope.turn_kernel, 4, ALIGNED=True, **shape))) <= 2 * interleaved
    assert len(narrow(ptx(rope.turn_kernel, 4, aligned=False, ALIGNED=False, **shape))) > 10  # the control


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(activation):
    shape = {"ACTIVATION": activation, "BLOCK": gated_passes.BLOCK}
    assert not narrow(ptx(gated.forward_kernel, gated_passes.WARPS, **shape))
    assert len(narrow(ptx(gated.forward_kernel, gated_passes.WARPS, aligned=False, **shape))) > 10  # the control
    assert not narrow(ptx(gated.backward_kernel, gated_passes.WARPS, WITH_H=True, **shape))
