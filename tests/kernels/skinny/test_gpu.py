"""On a GPU: the shapes of real models in bf16, and CUDA graphs that are replayed many times."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: `tox run -e gpu` needs one", allow_module_level=True)

pytest.importorskip("triton")

from tests.kernels.skinny.cases import allowed_gated, allowed_linear, make  # noqa: E402
from trl_turbo.kernels.skinny import Workspace, fits, op, skinny_gated, skinny_linear  # noqa: E402
from trl_turbo.kernels.skinny.reference import skinny_gated_reference, skinny_linear_reference  # noqa: E402

#: [N, K]: of Qwen2.5-1.5B, of Llama-3.1-8B, and such as no tile divides
SHAPES = [(8960, 1536), (1536, 8960), (2048, 1536), (14336, 4096), (4096, 14336), (777, 1040), (3, 16)]
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@each_dtype
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_real_shapes(n, k, dtype):
    rows, both, bias = make(16, 2 * n, k, dtype, "cuda")
    one, bias = both[:n], bias[:n]
    for m in (1, 3, 8, 16):
        x = rows[:m]
        assert fits(x, both)
        truth = skinny_gated_reference(x.double(), both.double(), "silu")
        assert ((skinny_gated(x, both, "silu").double() - truth).abs() <= allowed_gated(x, both, "silu")).all()
        truth = skinny_linear_reference(x.double(), one.double(), bias.double())
        assert ((skinny_linear(x, one, bias).double() - truth).abs() <= allowed_linear(x, one, bias)).all()


@each_dtype
def test_a_graph_that_is_replayed(dtype):
    """Two layers in one graph, which share scratch and counters, on new input each time: as outside of the graph."""
    n, k = 1536, 8960
    scratch = Workspace()
    x, first, _ = make(8, n, k, dtype, "cuda")
    second = first.flip(0).contiguous()

    def step():
        return [skinny_linear(x, weight, scratch=scratch) for weight in (first, second)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(50):
        x.copy_(torch.randn(8, k, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        found = [y.clone() for y in out]
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(found, out, strict=True))
        assert all(torch.equal(*pair) for pair in zip(found, step(), strict=True))
    for y, weight in zip(found, (first, second), strict=True):
        truth = skinny_linear_reference(x.double(), weight.double())
        assert ((y.double() - truth).abs() <= allowed_linear(x, weight)).all()
    made = scratch._made.values()
    assert made
    assert not any(counters.any() for _, counters in made)


def test_a_gated_graph_that_is_replayed():
    x, weight, _ = make(8, 2 * 8960, 1536, torch.bfloat16, "cuda")
    skinny_gated(x, weight, "silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = skinny_gated(x, weight, "silu")
    graph.replay()
    found = out.clone()
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(found, out)
    assert torch.equal(found, skinny_gated(x, weight, "silu"))


def test_scratch_is_not_made_during_a_capture():
    x, weight, _ = make(8, 1536, 8960, torch.bfloat16, "cuda")
    scratch = Workspace()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="no scratch yet"):
        skinny_linear(x, weight, scratch=scratch)


def test_what_the_kernels_take(monkeypatch):
    x, weight, _ = make(8, 64, 64, torch.bfloat16, "cuda")
    assert fits(x, weight)
    assert fits(x[:1], weight[:1])
    assert fits(torch.cat((x, x), 1)[:, :64], weight)
    for a, b in (
        (torch.cat((x, x, x)), weight),
        (x[:0], weight),
        (x.float(), weight.float()),
        (x, weight.half()),
        (x, weight.cpu()),
        (x[:, :40], weight[:, :40]),
        (x.t().contiguous().t(), weight),
        (x, weight.t().contiguous().t()),
        (x[:, 1:33], weight[:, :32]),
        (torch.cat((x, x[:, :8]), 1)[:, :64], weight),
    ):
        assert not fits(a, b)
    monkeypatch.setattr(op, "skinny_linear_reference", None)
    skinny_linear(x, weight)  # by the kernel
    with pytest.raises(TypeError):
        skinny_linear(torch.cat((x, x, x)), weight)
