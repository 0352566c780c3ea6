"""`rms_norm` and `add_rms_norm` as they are called, with the plain torch that serves the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.saved import saved_bytes
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.kernels.rms_norm import add_rms_norm, reference, rms_norm
from trl_turbo.kernels.rms_norm.spec import Norm

LLAMA, GEMMA = {}, {"offset": 1.0, "scale_in_float32": True}
each_form = pytest.mark.parametrize("form", [LLAMA, GEMMA], ids=["llama", "gemma"])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def make(shape, dtype):
    torch.manual_seed(0)
    x, residual, grad = (torch.randn(*shape, dtype=dtype) for _ in range(3))
    return x.requires_grad_(), residual.requires_grad_(), torch.rand(shape[-1], dtype=dtype).requires_grad_(), grad


@each_form
def test_gradcheck(form):
    x, residual, weight, _ = make((3, 2, 7), torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, **form), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, 1e-5, **form), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, 1e-5)[0], (x, residual, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, 1e-5)[1] ** 2, (x, residual, weight))


@each_form
@each_dtype
def test_forward_is_the_modules_to_the_bit(dtype, form):
    """transformers' own, written here as there; whole models are compared in the trainers' tests."""
    x, _, weight, _ = make((5, 64), dtype)
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    wanted = (y * (1.0 + weight.float())).type_as(x) if form else weight * y.to(dtype)
    assert torch.equal(rms_norm(x, weight, 1e-6, **form), wanted)


@each_form
@each_dtype
def test_gradients_are_no_further_from_the_truth_than_autograds(dtype, form):
    x, residual, weight, grad = make((130, 96), dtype)
    y, total = add_rms_norm(x, residual, weight, 1e-6, **form)
    found = torch.autograd.grad((y, total), (x, residual, weight), (grad, grad))
    norm = Norm(1e-6, *form.values())

    def by_autograd(dtype):
        leaves = [(x + residual).detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()]
        y = reference.rms_norm_reference(*leaves, norm)
        grads = torch.autograd.grad((y, leaves[0] * 1), leaves, (grad.to(dtype),) * 2)
        return grads[0], grads[0], grads[1]

    for mine, plain, truth in zip(found, by_autograd(dtype), by_autograd(torch.float64), strict=True):
        assert excess_error(mine, plain, truth, 0.1 if mine.ndim > 1 else 1.0) <= 1


@each_form
def test_what_is_kept_for_backward(form):
    x, residual, weight, _ = make((3, 40, 64), torch.bfloat16)
    rstd = 3 * 40 * 4
    assert saved_bytes(lambda: rms_norm(x, weight, 1e-6, **form)) == x.nbytes + weight.nbytes + rstd
    # The sum is what the block goes on with: it is kept once, whoever else keeps it
    assert saved_bytes(lambda: add_rms_norm(x, residual, weight, 1e-6, **form)) == x.nbytes + weight.nbytes + rstd
    plain = saved_bytes(lambda: reference.rms_norm_reference(x, weight, Norm(1e-6, *form.values())))
    assert plain > 3 * x.nbytes  # the control: what autograd keeps is counted


def test_a_weight_that_does_not_train_gets_no_gradient():
    x, _, weight, grad = make((5, 8), torch.float32)
    y = rms_norm(x, weight.detach(), 1e-6)
    (first,) = torch.autograd.grad(y, x, grad)
    (second,) = torch.autograd.grad(rms_norm(x, weight, 1e-6), x, grad)
    assert torch.equal(first, second)
    assert not rms_norm(x.detach(), weight.detach(), 1e-6).requires_grad


def test_backward_twice():
    x, residual, weight, grad = make((5, 8), torch.float32)
    for y in (rms_norm(x, weight, 1e-6), add_rms_norm(x, residual, weight, 1e-6)[0]):
        first = torch.autograd.grad(y, (x, weight), grad, retain_graph=True)
        second = torch.autograd.grad(y, (x, weight), grad)
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y, x, grad)
    (first,) = torch.autograd.grad(rms_norm(x, weight, 1e-6), x, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_an_input_that_changed_is_noticed():
    x = torch.randn(4, 8)
    y = rms_norm(x, torch.ones(8, requires_grad=True), 1e-6)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (1, 8), (8,), (3, 0)], ids=str)
def test_empty_and_single_rows(shape):
    x, residual, weight, grad = make(shape, torch.float32)
    y, total = add_rms_norm(x, residual, weight, 1e-6)
    assert y.shape == total.shape == rms_norm(x, weight, 1e-6).shape == x.shape
    grads = torch.autograd.grad(y, (x, residual, weight), grad)
    assert all(g.isfinite().all() for g in grads)
    if x.numel() == 0:
        assert not grads[2].any()


def test_other_dtypes():
    x, residual, weight, _ = make((3, 8), torch.bfloat16)
    assert rms_norm(x, weight.float(), 1e-6).dtype == torch.float32
    assert rms_norm(x, weight.float(), 1e-6, **GEMMA).dtype == torch.bfloat16
    y, total = add_rms_norm(x, residual.float(), weight, 1e-6)
    assert torch.equal(total, x + residual.float())
    assert torch.equal(y, rms_norm(total, weight, 1e-6))


def test_in_a_compiled_graph():
    """Where the compiler fuses, it gets plain torch, without a break in its graph."""
    x, residual, weight, grad = make((4, 8), torch.float32)
    fused = torch.compile(lambda x, r, w: add_rms_norm(x, r, w, 1e-6), backend="aot_eager", fullgraph=True)
    for found, wanted in zip(fused(x, residual, weight), add_rms_norm(x, residual, weight, 1e-6), strict=True):
        torch.testing.assert_close(found, wanted)
        pair = (torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (found, wanted))
        torch.testing.assert_close(*pair)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"x is \[2, 7\] and weight \[8\]; they must be \[..., D\] and \[D\]"):
        rms_norm(torch.ones(2, 7), torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match=r"x is \[2, 8\] and residual \[8\]"):
        add_rms_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match="x is on cpu and weight on meta"):
        rms_norm(torch.ones(2, 8), torch.ones(8, device="meta"), 1e-6)
