"""The kernels compiled for Hopper, which needs no GPU: products by wgmma, loads that run ahead, few registers spilt."""
# ruff: noqa: E402

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")
backends = pytest.importorskip("triton.backends.compiler")

from trl_turbo.kernels.attention import kernel_forward, kernel_key, kernel_query, plan

KERNELS = {
    "forward": kernel_forward.forward_kernel,
    "query": kernel_query.query_kernel,
    "key": kernel_key.key_kernel,
}
pytestmark = pytest.mark.skipif(
    not isinstance(KERNELS["forward"], triton.JITFunction), reason="Triton's interpreter is on"
)
WIDE = ("lse_ptr", "stats_ptr", "sums_ptr")
TABLES = ("tiles_ptr", "items_ptr", "runs_ptr")
#: Shared memory of a program on Hopper, and bytes that a thread may spill: those of what is computed once.
SHARED, SPILLED = 232448, 256


def compiled(which, tile, width, **flags):
    """What the compiler makes of it for tensors in bf16 that lie at 16 bytes, as do their rows."""
    kernel = KERNELS[which]
    constants = {"HEADS": 8, "GROUP": 4, "WINDOW": False, "SOFTCAP": False, "PRECISION": "ieee", "D": width}
    constants |= {"COLUMNS": triton.next_power_of_2(width), "BLOCK": tile.block, "STEP": tile.step}
    constants |= {
        "STAGES": tile.stages,
        **({} if which == "key" else {"PREFIX": True}),
    }
    # Rows of a projection of 8 heads, and 2 of keys
    tokens = {name: width * 12 for name in kernel.arg_names if name.endswith("_token")}
    constants |= tokens | flags
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = "*fp32" if name in WIDE else "*bf16"
        pointer = "*i32" if name in TABLES else pointer
        pointer = "*i64" if name == "stats_ptr" and which == "key" else pointer
        number = "fp32" if name in ("scale", "softcap") else "i32"
        signature[name] = pointer if name.endswith("_ptr") else number
        if name.endswith(("_ptr", "_head")):
            attributes[i,] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = compiler.ASTSource(kernel, signature, places, attributes)
    return triton.compile(source, target=backends.GPUTarget("cuda", 90, 32), options={"num_warps": tile.warps})


def spilled(ptx, path):
    """Bytes that a thread puts out of its registers, and whether ptxas lets only one product run at a time."""
    nvidia = pytest.importorskip("triton.backends.nvidia")
    (path / "kernel.ptx").write_text(ptx)
    options = ["-v", "--gpu-name", "sm_90a", str(path / "kernel.ptx"), "-o", str(path / "kernel.cubin")]
    for ptxas in sorted(
        (Path(nvidia.__file__).parent / "bin").glob("ptxas*")
    ):  # for this version of PTX or an older one
        done = subprocess.run([str(ptxas), *options], capture_output=True, text=True)
        if done.returncode == 0:
            break
    else:
        pytest.fail(done.stderr)
    said = done.stderr
    return int(re.search(r"(\d+) bytes spill stores", said)[1]), "serialized" in said


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("which", KERNELS)
def test_products_are_wgmma_and_loads_run_ahead(which, width, tmp_path):
    tile = plan.tile(which, width, 2, SHARED)
    found = compiled(which, tile, width)
    ptx = found.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx
    assert len(re.findall(r"cp\.async\.cg", ptx)) >= 2 * tile.stages
    assert found.metadata.shared <= SHARED
    spill, serialized = spilled(ptx, tmp_path)
    assert spill <= SPILLED
    assert not serialized


@pytest.mark.parametrize("which", KERNELS)
def test_wide_heads_fit(which):
    found = compiled(which, plan.tile(which, 256, 2, SHARED), 256, WINDOW=True, SOFTCAP=True)
    assert "wgmma.mma_async" in found.asm["ptx"]
    assert found.metadata.shared <= SHARED


def test_control_a_loop_of_its_own_for_the_diagonal_was_serialized(tmp_path):
    """That ptxas says so at all: a product that another loop's result flows into without a wait between."""
    tile = plan.Tile(64, 64, 8, 2)  # two groups of warps side by side
    assert spilled(compiled("query", tile, 128, PREFIX=False).asm["ptx"], tmp_path)[1]


@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_plans_fit_what_they_are_chosen_for(width, itemsize):
    for which in KERNELS:
        for limit in (101376, 166912, SHARED):
            tile = plan.tile(which, width, itemsize, limit)
            assert tile.block >= 16
            assert tile.step >= 16
            assert tile.shared_bytes(which, max(width, 64), itemsize) <= limit


def test_without_a_gpu_tiles_are_small():
    assert plan.tile_of("forward", 128, torch.float32, torch.device("cpu")).block <= 64
