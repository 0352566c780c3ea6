"""The Triton kernels against plain torch, run by `tests/kernels/test_triton.py` in a process of their own."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch

from tests.kernels.poison import poisoned
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.kernels.rms_norm import passes, reference
from trl_turbo.kernels.rms_norm.kernel import plan
from trl_turbo.kernels.rms_norm.spec import Norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter computes bf16 wrongly
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
FORMS = [Norm(1e-6), Norm(1e-5, 1.0, True), Norm(1e-6, 1.0), Norm(1e-6, 0.0, True)]
SHAPES = [(1, 1, 1), (1, 64), (5, 37), (3, 7, 64), (2, 130, 96), (9, 1536), (3, 5000), (700, 8), (1, 16384)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_form = pytest.mark.parametrize("norm", FORMS, ids=str)


def make(shape, dtype, weight_dtype=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, residual, grad, other = (torch.randn(*shape, generator=g).to(DEVICE, dtype) for _ in range(4))
    weight = (1 + 0.3 * torch.randn(shape[-1], generator=g)).to(DEVICE, weight_dtype or dtype)
    return x, residual, weight, grad.to(torch.promote_types(dtype, weight.dtype)), other


def by_autograd(x, residual, weight, grad, other, norm, dtype):
    """Everything that the passes compute, by autograd through the reference in one dtype."""
    x, residual, weight = (y.to(dtype if dtype == torch.float64 else y.dtype) for y in (x, residual, weight))
    total = (x + residual).requires_grad_()
    weight = weight.clone().requires_grad_()
    y = reference.rms_norm_reference(total, weight, norm)
    (y * grad.to(y.dtype)).sum().backward()
    return {"y": y.detach(), "grad_x": total.grad, "grad_both": total.grad + other, "grad_weight": weight.grad}


def near(found, plain, truth, slack=0.1):
    for name, value in found.items():
        assert value.shape == truth[name].shape
        # Few numbers scatter: a single element's luck is not what the rule is about
        few = truth[name].numel() < 2000
        assert excess_error(value, plain[name], truth[name], 1.0 if few else slack) <= 1, name


def run(x, residual, weight, grad, other, norm):
    """All passes, into memory that is NaN before, with the sum rounded as torch rounds it: by two ways each, which the
    compiler may round differently.
    """
    before = [y.clone() for y in (x, residual, weight, grad, other)]
    with poisoned():
        y, total, rstd = passes.add_forward(x, residual, weight, norm)
        assert torch.equal(total, x + residual)
        again, _ = passes.forward(total, weight, norm)
        assert y.stride() == again.stride()
        assert y.stride() == total.stride()
        assert rstd.shape == (*x.shape[:-1], 1)
        grad_x, grad_weight = passes.backward(grad, total, weight, rstd, norm)
        without, none = passes.backward(grad, total, weight, rstd, norm, needs_weight=False)
        both, twice = passes.backward(grad, total, weight, rstd, norm, grad_x=other)
    assert none is None
    assert all(torch.equal(*pair) for pair in zip(before, (x, residual, weight, grad, other), strict=True))
    first = {"y": y, "grad_x": grad_x, "grad_both": both, "grad_weight": grad_weight}
    return first, {**first, "y": again, "grad_x": without, "grad_weight": twice}


def check(x, residual, weight, grad, other, norm):
    plain = by_autograd(x, residual, weight, grad, other, norm, x.dtype)
    # The truth starts from the rounded sum: its rounding is checked to the bit
    total = (x + residual).double()
    truth = by_autograd(total, torch.zeros_like(total), weight, grad, other, norm, torch.float64)
    dtypes = {"y": norm.out_dtype(x, weight), "grad_x": x.dtype, "grad_both": x.dtype, "grad_weight": weight.dtype}
    for found in run(x, residual, weight, grad, other, norm):
        assert {name: y.dtype for name, y in found.items()} == dtypes
        near(found, plain, truth)


# The interpreter is slow: it gets all sizes in one form alone
@pytest.mark.parametrize(
    ("shape", "norm"),
    [(shape, norm) for norm in FORMS for shape in SHAPES if CUDA or norm == FORMS[0] or shape in SHAPES[2:6]],
    ids=str,
)
@each_dtype
def test_as_autograd(shape, dtype, norm):
    check(*make(shape, dtype), norm)


@each_form
@pytest.mark.parametrize(("dtype", "weight_dtype"), itertools.permutations(DTYPES, 2), ids=str)
def test_a_weight_of_another_dtype(dtype, weight_dtype, norm):
    check(*make((11, 200), dtype, weight_dtype), norm)


LAYOUTS = {
    "heads transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of a fused projection": lambda x: torch.cat((x, x, x), -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "rows apart": lambda x: torch.stack((x, x), 2)[:, :, 1],
    "columns apart": lambda x: torch.stack((x, x), -1)[..., 0],
    "three strides": lambda x: torch.stack((x, x), 2)[:, :, 0].repeat_interleave(2, 0)[::2],
    "broadcast": lambda x: x[:1, :, :1].expand(x.shape),
}


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout, others):
    tensors = make((3, 4, 5, 24), torch.float32)
    x, residual, weight, grad, other = tensors
    if others:
        tensors = (x, layout(residual), weight, layout(grad), layout(other))
    else:
        tensors = (layout(x), residual, torch.stack((weight, weight), 1)[:, 0], grad, other)
    check(*tensors, FORMS[0])


def test_control_what_nobody_writes_is_nan(monkeypatch):
    monkeypatch.setattr(passes, "forward_kernel", mock.MagicMock())
    with poisoned():
        y, rstd = passes.forward(torch.ones(3, 8), torch.ones(8), FORMS[0])
    assert y.isnan().all()
    assert rstd.isnan().all()


def test_the_layout_of_heads_is_kept():
    x = make((2, 5, 3, 16), torch.float32)[0].transpose(1, 2)
    y, rstd = passes.forward(x, torch.ones(16, device=DEVICE), FORMS[0])
    assert y.stride() == x.stride()
    truth = reference.forward(x.double(), torch.ones(16, device=DEVICE), FORMS[0])[1]
    assert excess_error(rstd, truth.float(), truth) <= 1


def test_numbers_at_the_ends():
    """A row of zeros, one of the largest numbers, infinities and NaN stay what plain torch makes of them."""
    x, _, weight, grad, _ = make((6, 40), torch.float16)
    x[0], x[1], x[2, 3], x[3, 3], x[4] = 0, 65504, torch.inf, torch.nan, 2e-7
    y, rstd = passes.forward(x, weight, FORMS[0])
    wanted, wanted_rstd = reference.forward(x, weight, FORMS[0])
    torch.testing.assert_close(rstd, wanted_rstd, equal_nan=True, rtol=1e-6, atol=0)
    torch.testing.assert_close(y, wanted, equal_nan=True, rtol=2**-10, atol=0)
    found = passes.backward(grad, x, weight, rstd, FORMS[0])
    for mine, theirs in zip(found, reference.backward(grad, x, weight, rstd, FORMS[0]), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
    assert not found[0][[0, 1, 4, 5]].isnan().any()


def test_the_weights_gradient_is_the_same_each_time():
    x, _, weight, grad, _ = make((999, 64), torch.float32)
    _, rstd = passes.forward(x, weight, FORMS[0])
    grads = [passes.backward(grad, x, weight, rstd, FORMS[0])[1] for _ in range(3)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("elements", [passes.TILE, passes.SUM_TILE])
@pytest.mark.parametrize("width", [1, 40, 64, 128, 256, 1536, 4096, 5120, 8192, 16384])
def test_plans(width, elements):
    tile = plan(width, elements)
    assert tile.block >= width
    assert tile.rows * tile.block <= max(elements, tile.block)
    assert 8 <= tile.rows * tile.block / (32 * tile.warps) <= 32
