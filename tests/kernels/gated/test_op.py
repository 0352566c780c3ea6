"""`gated` and its two passes as they are called, with the plain torch that serves the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.saved import saved_bytes
from trl_turbo.kernels.gated import ACTIVATIONS, gated, gated_backward, gated_forward, reference
from trl_turbo.kernels.linear_logprob.reference import excess_error

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def make(shape, dtype):
    torch.manual_seed(0)
    gate, up, grad = (scale * torch.randn(*shape, dtype=dtype) for scale in (2, 1, 1))
    return gate.requires_grad_(), up.requires_grad_(), grad


@each_activation
def test_gradcheck(activation):
    gate, up, _ = make((3, 2, 7), torch.float64)
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, activation), (gate, up))


@each_activation
@each_dtype
def test_no_further_from_the_truth_than_autograd(dtype, activation):
    gate, up, grad = make((50, 96), dtype)
    h = gated(gate, up, activation)
    found = (h, *torch.autograd.grad(h, (gate, up), grad))

    def by_autograd(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (gate, up)]
        h = reference.gated_reference(*leaves, activation)
        return h, *torch.autograd.grad(h, leaves, grad.to(dtype))

    for mine, plain, truth in zip(found, by_autograd(dtype), by_autograd(torch.float64), strict=True):
        assert excess_error(mine, plain, truth) <= 1


@each_activation
def test_the_two_passes_are_what_autograd_uses(activation):
    gate, up, grad = make((5, 33), torch.bfloat16)
    h = gated(gate, up, activation)
    wanted = torch.autograd.grad(h, (gate, up), grad)
    assert torch.equal(gated_forward(gate, up, activation), h)
    before = [x.detach().clone() for x in (gate, up, grad)]
    again, grad_gate, grad_up = gated_backward(grad, gate, up, activation)
    assert torch.equal(again, h)
    assert torch.equal(grad_gate, wanted[0])
    assert torch.equal(grad_up, wanted[1])
    assert not any(x.requires_grad for x in (again, grad_gate, grad_up))
    assert all(torch.equal(*pair) for pair in zip(before, (gate, up, grad), strict=True))
    assert gated_backward(grad, gate, up, activation, with_h=False)[0] is None


def test_in_place():
    gate, up, grad = (x.detach() for x in make((5, 33), torch.bfloat16))
    wanted = gated_backward(grad, gate, up, "silu")
    h, grad_gate, grad_up = gated_backward(grad, gate, up, "silu", in_place=True)
    assert grad_gate is gate
    assert grad_up is up
    assert all(torch.equal(*pair) for pair in zip(wanted, (h, gate, up), strict=True))


@each_activation
def test_what_is_kept_for_backward(activation):
    gate, up, _ = make((3, 40, 64), torch.bfloat16)
    assert saved_bytes(lambda: gated(gate, up, activation)) == gate.nbytes + up.nbytes
    # The control: autograd keeps the activation too
    assert saved_bytes(lambda: reference.gated_reference(gate, up, activation)) == 3 * gate.nbytes


def test_backward_twice():
    gate, up, grad = make((5, 8), torch.float32)
    h = gated(gate, up, "silu")
    first = torch.autograd.grad(h, (gate, up), grad, retain_graph=True)
    second = torch.autograd.grad(h, (gate, up), grad)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(h, gate, grad)
    (first,) = torch.autograd.grad(gated(gate, up, "silu"), gate, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_gradients_written_over_what_another_backward_needs_are_noticed():
    gate, up, grad = make((5, 8), torch.float32)
    h = gated(gate, up, "silu")
    gated_backward(grad, gate, up, "silu", in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (1, 1), (3,)], ids=str)
def test_empty_and_single(shape):
    gate, up, grad = make(shape, torch.float32)
    h = gated(gate, up, "gelu")
    assert h.shape == gate.shape
    assert all(g.shape == gate.shape for g in torch.autograd.grad(h, (gate, up), grad))


def test_two_dtypes():
    gate, up, _ = make((3, 8), torch.bfloat16)
    h = gated(gate, up.float(), "silu")
    assert h.dtype == torch.float32
    h.sum().backward()
    assert gate.grad.dtype == torch.bfloat16


def test_in_a_compiled_graph():
    gate, up, _ = make((4, 8), torch.float32)
    fused = torch.compile(lambda g, u: gated(g, u, "silu"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fused(gate, up), gated(gate, up, "silu"))


def test_what_does_not_fit_is_refused():
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match="There is no activation 'relu'; name one of silu, gelu, gelu_tanh"):
        gated(x, x, "relu")
    with pytest.raises(ValueError, match=r"gate is \[2, 8\] on cpu and up \[2, 7\] on cpu"):
        gated(x, x[:, :7], "silu")
    with pytest.raises(ValueError, match=r"grad_h is \[1, 8\] and gate \[2, 8\]"):
        gated_backward(x[:1], x, x, "silu")
