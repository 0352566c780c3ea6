"""Norms, rotary embedding and gated product on a GPU: which passes serve, offsets beyond 2^31, grids, and memory."""

from __future__ import annotations

import pytest
import torch

from trl_turbo.kernels import rows
from trl_turbo.kernels.gated import gated, gated_backward
from trl_turbo.kernels.gated import reference as gated_reference
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.kernels.rms_norm import add_rms_norm, rms_norm
from trl_turbo.kernels.rms_norm import reference as norm_reference
from trl_turbo.kernels.rms_norm.spec import WIDEST, Norm
from trl_turbo.kernels.rope import reference as rope_reference
from trl_turbo.kernels.rope import rope

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: `tox run -e gpu` needs one", allow_module_level=True)

pytest.importorskip("triton")
BF16 = torch.bfloat16


def randn(*shape, dtype=BF16, grad=True):
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_(grad)


def room(gib):
    if torch.cuda.mem_get_info()[0] < gib << 30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


class Counting:
    """How often plain torch serves."""

    def __init__(self, monkeypatch):
        self.calls = 0
        for module, names in (
            (norm_reference, ("forward", "add_forward", "backward")),
            (rope_reference, ("turn",)),
            (gated_reference, ("forward", "backward")),
        ):
            for name in names:
                monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, fn):
        def counted(*args, **kwargs):
            self.calls += 1
            return fn(*args, **kwargs)

        return counted


def test_kernels_serve_and_plain_torch_what_they_do_not_take(monkeypatch):
    counting = Counting(monkeypatch)
    x, weight = randn(4, 7, 64), randn(64)
    y, total = add_rms_norm(rms_norm(x, weight, 1e-6), x, weight, 1e-6)
    q = k = y.view(4, 7, 4, 16).transpose(1, 2)
    cos = sin = torch.rand(1, 7, 16, device="cuda", dtype=BF16)
    q, k = rope(q, k, cos, sin)
    (gated(q, k, "silu").sum() + total.sum()).backward()
    assert counting.calls == 0
    wide = randn(2, WIDEST + 8)
    rms_norm(wide, randn(WIDEST + 8), 1e-6).sum().backward()
    assert counting.calls == 2
    gated(x.double(), x.double(), "silu")
    assert counting.calls == 3
    gated(randn(0, 8), randn(0, 8), "silu").sum().backward()
    assert counting.calls == 5


def test_a_weights_gradient_is_the_same_each_time_and_right():
    x, weight, grad = randn(32768, 1536), randn(1536), randn(32768, 1536, grad=False)
    y = rms_norm(x, weight, 1e-6)
    first = torch.autograd.grad(y, weight, grad, retain_graph=True)[0]
    for _ in range(5):
        assert torch.equal(first, torch.autograd.grad(y, weight, grad, retain_graph=True)[0])

    def by_autograd(dtype):
        leaf = weight.detach().to(dtype).requires_grad_()
        y = norm_reference.rms_norm_reference(x.detach().to(dtype), leaf, Norm(1e-6))
        return torch.autograd.grad(y, leaf, grad.to(dtype))[0]

    assert excess_error(first, by_autograd(BF16), by_autograd(torch.float64)) <= 1


def test_rows_beyond_2_31_elements():
    room(40)
    n, width = 1_100_000, 2048
    x = torch.empty(n, width, device="cuda", dtype=BF16).normal_().requires_grad_()
    weight = randn(width, grad=False)
    y = rms_norm(x, weight, 1e-6)
    part = slice(n - 1000, n)
    assert torch.equal(y[part], rms_norm(x[part].detach().clone(), weight, 1e-6))
    (grad,) = torch.autograd.grad(y, x, y.detach())
    small = x[part].detach().clone().requires_grad_()
    again = rms_norm(small, weight, 1e-6)
    assert torch.equal(grad[part], torch.autograd.grad(again, small, again.detach())[0])


def test_a_gate_beyond_2_31_elements():
    room(40)
    n, width = 1_100_000, 2048
    gate, up = (torch.empty(n, width, device="cuda", dtype=BF16).normal_() for _ in range(2))
    part = slice(n - 1000, n)
    small = gate[part].clone(), up[part].clone()
    h = gated(gate, up, "silu")
    assert torch.equal(h[part], gated(*small, "silu"))
    wanted = gated_backward(h[part].clone(), *small, "silu", with_h=False)
    _, grad_gate, grad_up = gated_backward(h, gate, up, "silu", in_place=True, with_h=False)
    assert torch.equal(grad_gate[part], wanted[1])
    assert torch.equal(grad_up[part], wanted[2])


def test_halves_beyond_2_31_elements():
    """Rows of a fused projection, which are not one long row."""
    room(40)
    n, width = 600_000, 2048
    fused = torch.empty(n, 2 * width, device="cuda", dtype=BF16).normal_()
    gate, up = fused.chunk(2, -1)
    part = slice(n - 1000, n)
    assert torch.equal(gated(gate, up, "gelu_tanh")[part], gated(gate[part].clone(), up[part].clone(), "gelu_tanh"))


def test_heads_beyond_2_31_elements():
    room(40)
    length, heads, width = 600_000, 32, 128
    q = torch.empty(1, length, heads, width, device="cuda", dtype=BF16).normal_().transpose(1, 2)
    k = torch.empty(1, length, 2, width, device="cuda", dtype=BF16).normal_().transpose(1, 2)
    angles = torch.rand(1, length, width, device="cuda") * 6
    cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)
    q_out, k_out = rope(q, k, cos, sin)
    part = slice(length - 1000, length)
    wanted = rope(*(x[:, :, part].clone() for x in (q, k)), cos[:, part], sin[:, part])
    assert torch.equal(q_out[:, :, part], wanted[0])
    assert torch.equal(k_out[:, :, part], wanted[1])


def test_more_rows_than_a_grids_second_dimension_takes():
    x = randn(70_001, 3, grad=False)
    weight = randn(3, grad=False)
    assert (
        excess_error(
            rms_norm(x, weight, 1e-6),
            norm_reference.rms_norm_reference(x, weight, Norm(1e-6)),
            norm_reference.rms_norm_reference(x.double(), weight.double(), Norm(1e-6)),
        )
        <= 1
    )
    fused = randn(70_001, 6, grad=False)
    halves = fused.chunk(2, -1)
    assert torch.equal(gated(*halves, "silu"), gated(*(x.contiguous() for x in halves), "silu"))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [896, 1536, 2048, 3072, 3584, 4096, 5120, 8192, 12288, 16384])
def test_widths_of_models_with_all_that_trains(width, dtype):
    """Each compiles and fits the shared memory and registers, the pipeline over rows included."""
    leaves = [randn(1000, width, dtype=dtype), randn(1000, width, dtype=dtype), randn(width, dtype=dtype)]
    grad = randn(1000, width, dtype=dtype, grad=False)
    y, total = add_rms_norm(*leaves, 1e-6)
    found = torch.autograd.grad((y, total), leaves, (grad, grad))
    sums = (leaves[0] + leaves[1]).detach()

    def by_autograd(dtype):
        x, weight = sums.to(dtype).requires_grad_(), leaves[2].detach().to(dtype).requires_grad_()
        y = norm_reference.rms_norm_reference(x, weight, Norm(1e-6))
        grad_x, grad_weight = torch.autograd.grad((y, x * 1), (x, weight), (grad.to(dtype),) * 2)
        return grad_x, grad_x, grad_weight

    for mine, plain, truth in zip(found, by_autograd(dtype), by_autograd(torch.float64), strict=True):
        assert excess_error(mine, plain, truth) <= 1


def test_memory_is_that_of_the_outputs():
    x, weight = randn(8192, 4096), randn(4096)
    grad = torch.ones_like(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = rms_norm(x, weight, 1e-6)
    torch.autograd.grad(y, (x, weight), grad)
    partial = 2 * torch.cuda.get_device_properties(0).multi_processor_count * 4096 * 4
    assert torch.cuda.max_memory_allocated() - before <= 2 * x.nbytes + 8192 * 4 + partial + (1 << 20)


def test_on_a_stream_of_its_own():
    x, weight = randn(512, 1536, grad=False), randn(1536, grad=False)
    wanted = rms_norm(x, weight, 1e-6)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = rms_norm(x, weight, 1e-6)
    stream.synchronize()
    assert torch.equal(found, wanted)


def test_in_a_graph():
    """Nothing waits for the device, so a CUDA graph can hold all of it."""
    x, weight = randn(64, 1536), randn(1536)
    cos = sin = torch.rand(1, 64, 128, device="cuda", dtype=BF16)

    def step():
        y = rms_norm(x, weight, 1e-6)
        q = y.view(1, 64, 12, 128).transpose(1, 2)
        q, k = rope(q, q[:, :2], cos, sin)
        out = gated(q[:, :2], k, "silu")
        return torch.autograd.grad(out, (x, weight), out.detach())

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wanted = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_takes():
    x = randn(2, 8)
    assert rows.takes(x, torch.nn.Parameter(x))
    assert not rows.takes(x, x.cpu())
    assert not rows.takes(x, x.double())
    assert not rows.takes(x[:0])
