"""The kernels compiled for Hopper, which needs no GPU: reads of 16 bytes ahead, and who comes last is told in order."""
# ruff: noqa: E402

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")
backends = pytest.importorskip("triton.backends.compiler")

from trl_turbo.kernels.skinny import kernel, tiles

pytestmark = pytest.mark.skipif(
    not isinstance(kernel.linear_kernel, triton.JITFunction), reason="Triton's interpreter is on"
)


def compiled(kind, m, n, k, aligned=True):
    """What the compiler makes of it for a weight [N, K], or of halves [N, K], in bf16."""
    tile = tiles.gated_tile(m, n, k) if kind == "gated" else tiles.linear_tile(m, n, k)
    function = kernel.gated_kernel if kind == "gated" else kernel.linear_kernel
    constants = kernel._constants(tile, m, n, k)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants |= {"ACTIVATION": "silu"} if kind == "gated" else {"BIAS": True, "SPLIT": tile.split, "PITCH": 16}
    kinds = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16")
    kinds |= {"partial_ptr": "*fp32", "counter_ptr": "*i32"}
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    lie = [i for i, name in enumerate(names) if name not in constants and name not in ("m", "n")]
    source = compiler.ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in lie if aligned},
    )
    found = triton.compile(source, target=backends.GPUTarget("cuda", 90, 32), options=options)
    return found.asm["ptx"], found.metadata.shared, tile


@pytest.mark.parametrize("m", [8, 16])
@pytest.mark.parametrize(
    ("kind", "n", "k"), [("gated", 8960, 1536), ("linear", 1536, 8960), ("gated", 14336, 4096), ("linear", 4096, 14336)]
)
def test_reads_ahead_and_all_programs_fit(kind, n, k, m):
    text, shared, tile = compiled(kind, m, n, k)
    assert text.count("cp.async.cg.shared.global") >= 2 * (tile.stages - 1)
    assert "mma" in text
    # 228 KiB of a processor, 1 of which each program takes for itself
    programs = -(-n // tile.rows) * tile.split
    assert (shared + 1024) * -(-programs // tiles.PROCESSORS) <= 228 << 10


def test_arrivals_are_told_after_a_barrier_and_before_the_others_sums_are_read():
    text, _, tile = compiled("linear", 8, 1536, 8960)
    (arrival,) = re.finditer(r"atom\.global\.gpu\.acq_rel\.add\.u32", text)
    before, after = text[: arrival.start()], text[arrival.end() :]
    assert before.rindex("bar.sync") > before.rindex("st.global") > 0
    assert len(re.findall(r"ld\.global\.cg", after)) >= tile.split
    assert 0 < after.index("bar.sync") < after.index("ld.global.cg")
    assert "ld.global.cg" not in before


def test_control_reads_of_unaligned_weights_are_seen():
    text, _, _ = compiled("gated", 8, 8960, 1536, aligned=False)
    assert "cp.async.cg.shared.global" not in text
