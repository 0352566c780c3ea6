"""The Triton kernels against plain torch, run by `tests/kernels/test_triton.py` in a process of their own."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.poison import poisoned
from trl_turbo.kernels.gated import ACTIVATIONS, passes, reference
from trl_turbo.kernels.linear_logprob.reference import excess_error

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter computes bf16 wrongly
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
SHAPES = [(1,), (1, 1), (5, 37), (3, 7, 64), (2, passes.BLOCK), (3, passes.BLOCK + 1), (2, 2, 8960)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def make(shape, dtype):
    g = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(*shape, generator=g)).to(DEVICE, dtype) for scale in (1, 3, 1)]


def by_autograd(grad, gate, up, activation, dtype):
    gate, up = gate.to(dtype).detach().requires_grad_(), up.to(dtype).detach().requires_grad_()
    h = reference.gated_reference(gate, up, activation)
    return h.detach(), *torch.autograd.grad(h, (gate, up), grad.to(dtype))


def check(grad, gate, up, activation):
    """Both passes into memory that is NaN before, with h and without."""
    before = [x.clone() for x in (grad, gate, up)]
    with poisoned():
        h = passes.forward(gate, up, activation)
        found = passes.backward(grad, gate, up, activation)
        without = passes.backward(grad, gate, up, activation, with_h=False)
    assert without[0] is None
    assert all(torch.equal(*pair) for pair in zip(before, (grad, gate, up), strict=True))
    plain = by_autograd(grad, gate, up, activation, gate.dtype)
    truth = by_autograd(grad, gate, up, activation, torch.float64)
    twice = ((h, *without[1:]), found)
    for mine, theirs, right in (y for one in twice for y in zip(one, plain, truth, strict=True)):
        assert mine.dtype == gate.dtype
        assert mine.shape == right.shape
        assert excess_error(mine, theirs, right, 1.0 if right.numel() < 2000 else 0.1) <= 1
    return found


@each_activation
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_autograd(shape, dtype, activation):
    check(*make(shape, dtype), activation)


@each_dtype
def test_in_place(dtype):
    grad, gate, up = make((33, 65), dtype)
    found = check(grad, gate, up, "silu")
    versions = gate._version, up._version
    h, grad_gate, grad_up = passes.backward(grad, gate, up, "silu", in_place=True)
    assert grad_gate is gate
    assert grad_up is up
    assert all(torch.equal(*pair) for pair in zip(found, (h, grad_gate, grad_up), strict=True))
    assert gate._version > versions[0]
    assert up._version > versions[1]


def test_in_place_in_halves_of_a_fused_projection():
    grad, gate, up = make((9, 40), torch.float32)
    fused = torch.cat((gate, up), -1)
    found = check(grad, gate, up, "gelu_tanh")
    passes.backward(grad, *fused.chunk(2, -1), "gelu_tanh", in_place=True)
    assert torch.equal(fused, torch.cat(found[1:], -1))


LAYOUTS = {
    "half of a fused projection": lambda x: torch.cat((x, x), -1)[..., x.shape[-1] :],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda x: torch.stack((x, x), -1)[..., 0],
    "broadcast": lambda x: x[:1, :1].expand(x.shape),
}


@pytest.mark.parametrize("which", [(0,), (1,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout, which):
    tensors = make((3, 5, 24), torch.float32)
    check(*(layout(x) if i in which else x for i, x in enumerate(tensors)), "silu")


def test_in_place_in_columns_apart():
    grad, gate, up = make((3, 5), torch.float32)
    found = check(grad, gate, up, "silu")
    both = torch.stack((gate, up), -1)
    passes.backward(grad, both[..., 0], both[..., 1], "silu", in_place=True)
    assert torch.equal(both[..., 0], found[1]) or excess_error(both[..., 0], found[1], found[1]) <= 1
    assert excess_error(both[..., 1], found[2], found[2]) <= 1


@each_activation
@each_dtype
def test_numbers_at_the_ends(dtype, activation):
    """Large gates are let through or shut off without an overflow; NaN stays NaN."""
    gate = torch.tensor([-torch.inf, -6e4, -100.0, -20.0, -0.0, 0.0, 1e-7, 20.0, 100.0, 6e4, torch.nan])
    gate = gate.to(DEVICE, dtype)
    up = torch.full_like(gate, 0.5)
    found = passes.backward(up, gate, up, activation)
    wide = [x.double() if CUDA else x.float() for x in (up, gate, up)]
    wanted = reference.backward(*wide, activation)
    for mine, right in zip(found, wanted, strict=True):
        finite = right.isfinite()
        assert finite[1:-1].all()
        assert mine[-1].isnan()
        torch.testing.assert_close(
            mine[1:-1].double(), right[1:-1].double(), rtol=4 * torch.finfo(dtype).eps, atol=1e-6
        )
