"""The public functions in plain torch, what they refuse, how a tile is chosen and who keeps the scratch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.kernels.skinny.cases import make
from trl_turbo.kernels.skinny import Workspace, fits, skinny_gated, skinny_linear, tiles, workspace

#: [N, K] of Qwen2.5-1.5B's and Llama-3.1-8B's layers, and small ones
WEIGHTS = [(8960, 1536), (1536, 8960), (2048, 1536), (1536, 1536), (14336, 4096), (4096, 14336), (256, 64), (1, 16)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [0, 1, 16, 17])
def test_plain_torch_serves_the_cpu(m, dtype):
    x, weight, bias = make(m, 24, 32, dtype)
    assert not fits(x, weight)
    gate, up = functional.linear(x, weight).chunk(2, -1)
    assert torch.equal(skinny_gated(x, weight, "silu"), functional.silu(gate) * up)
    assert torch.equal(skinny_gated(x, weight, "gelu"), functional.gelu(gate) * up)
    assert torch.equal(skinny_gated(x, weight, "gelu_tanh"), functional.gelu(gate, approximate="tanh") * up)
    assert torch.equal(skinny_linear(x, weight), functional.linear(x, weight))
    found = skinny_linear(x, weight.requires_grad_(), bias)
    assert torch.equal(found, functional.linear(x, weight, bias))
    assert not found.requires_grad


@pytest.mark.parametrize("of", [skinny_linear, lambda x, weight: skinny_gated(x, weight, "silu")])
def test_shapes_and_dtypes_that_do_not_fit(of):
    x, weight, _ = make(2, 24, 32, torch.float32)
    with pytest.raises(ValueError, match=r"takes x \[M, K\] and a weight \[N, K\]; found \[2, 31\] and \[24, 32\]"):
        of(x[:, :31], weight)
    with pytest.raises(ValueError, match=r"found \[2, 1, 32\] and \[24, 32\]"):
        of(x[:, None], weight)
    with pytest.raises(ValueError, match=r"one floating dtype on one device; found torch\.float16 on cpu and torch\.f"):
        of(x.half(), weight)
    with pytest.raises(ValueError, match="one floating dtype"):
        of(x.int(), weight.int())


def test_what_else_does_not_fit():
    x, weight, bias = make(2, 24, 32, torch.float32)
    with pytest.raises(ValueError, match=r"no activation 'relu'; name one of silu, gelu, gelu_tanh"):
        skinny_gated(x, weight, "relu")
    with pytest.raises(ValueError, match=r"weight \[2 \* I, K\]; found an odd number of rows, 23"):
        skinny_gated(x, weight[:23], "silu")
    with pytest.raises(ValueError, match=r"a bias \[24\] in torch\.float32 on cpu; found \[23\] in"):
        skinny_linear(x, weight, bias[:23])
    with pytest.raises(ValueError, match=r"found \[24\] in torch\.float16"):
        skinny_linear(x, weight, bias.half())


@pytest.mark.parametrize("m", [1, 8, 9, 16])
@pytest.mark.parametrize(("n", "k"), WEIGHTS)
@pytest.mark.parametrize("kind", ["gated", "linear"])
def test_tiles_run_at_once_where_they_can(kind, n, k, m):
    tile = tiles.gated_tile(m, n, k) if kind == "gated" else tiles.linear_tile(m, n, k)
    found = tiles.candidates(kind, m, n, k)
    assert tile in found
    for one in found:
        assert 1 <= one.rows <= one.block_n <= 64
        assert one.block_n & (one.block_n - 1) == 0
        assert 16 <= one.block_k < 2 * max(k, 16)
        assert one.split == 1 if kind == "gated" else 1 <= one.split <= -(-k // one.block_k)
        assert one.block_m(m) >= m
        # At least two stages' worth must fit into what one program may have
        assert one.stages >= 2
        assert (one.stages - 1) * (one.block_n * (1 + (kind == "gated")) + 16) * one.block_k * 2 <= 227 << 10
    programs = -(-n // tile.rows) * tile.split
    if n * k > 2**22 and (kind == "linear" or n > k):
        assert programs >= 2 * tiles.PROCESSORS or tile.rows == 64
        assert programs <= max(tiles.PER_PROCESSOR) * tiles.PROCESSORS


def test_a_measured_tile_is_taken(monkeypatch):
    tile = tiles.Tile(16, 64, 4, 3, 2)
    monkeypatch.setitem(tiles.MEASURED, ("linear", 8, 96, 64), tile)
    assert tiles.linear_tile(5, 96, 64) is tile
    assert tiles.linear_tile(9, 96, 64) is not tile


def test_scratch_is_made_once_for_a_shape_and_not_during_a_capture(monkeypatch):
    made, cpu = Workspace(), torch.device("cpu")
    partial, counters = made.of(cpu, 24, 3)
    assert partial.shape == (3, 24, 16)
    assert not counters.any()
    assert made.of(cpu, 24, 3)[0] is partial
    assert made.of(cpu, 24, 4)[0] is not partial
    assert workspace.shared() is workspace.shared()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="no scratch yet for 24 outputs in 3 parts, and a CUDA graph is"):
        made.of(torch.device("cuda", 0), 24, 3)
