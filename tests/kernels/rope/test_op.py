"""`rope` as it is called, with the plain torch that serves the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.saved import saved_bytes
from trl_turbo.kernels.rope import reference, rope

each_layout = pytest.mark.parametrize("interleaved", [False, True])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def make(dtype, turned=8, batch_angles=2, angle_dtype=None, heads=(4, 2), length=5, width=8):
    torch.manual_seed(0)
    q, k = (torch.randn(2, length, n, width, dtype=dtype).transpose(1, 2).requires_grad_() for n in heads)
    angles = torch.rand(batch_angles, length, turned, dtype=torch.float64) * 6
    return q, k, *(f(angles).to(angle_dtype or dtype) for f in (torch.cos, torch.sin))


def as_transformers_does(x, cos, sin):
    """`apply_rotary_pos_emb` of the Llama models, partial as Phi3's is."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half = turned.shape[-1] // 2
    rotated = torch.cat((-turned[..., half:], turned[..., :half]), -1)
    return torch.cat([(turned * cos) + (rotated * sin), rest], -1)


@each_layout
@pytest.mark.parametrize("turned", [8, 4, 2, 0])
def test_gradcheck(turned, interleaved):
    q, k, cos, sin = make(torch.float64, turned, 1)
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, interleaved=interleaved), (q, k))


@pytest.mark.parametrize("turned", [8, 4])
@each_dtype
def test_as_transformers_to_the_bit_both_ways(dtype, turned):
    q, k, cos, sin = make(dtype, turned)
    grads = torch.randn_like(q), torch.randn_like(k)
    found = rope(q, k, cos, sin)
    wanted = tuple(as_transformers_does(x, cos, sin) for x in (q, k))
    for mine, right in zip(found, wanted, strict=True):
        assert torch.equal(mine, right)
        assert mine.stride() == q.stride()[:0] + torch.empty_like(mine).stride()
    for mine, right in zip(
        torch.autograd.grad(found, (q, k), grads), torch.autograd.grad(wanted, (q, k), grads), strict=True
    ):
        assert torch.equal(mine, right)


@each_dtype
def test_interleaved_is_the_same_turn_of_other_pairs(dtype):
    q, k, cos, sin = make(dtype)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # evens, then odds
    found = rope(q, k, cos, sin, interleaved=True)
    wanted = rope(q[..., order], k[..., order], cos[..., order], sin[..., order])
    for mine, right in zip(found, wanted, strict=True):
        assert torch.equal(mine[..., order], right)


def test_dimensions_stay_in_order_in_memory():
    """As attention takes them without a copy: heads of a token side by side where they were."""
    q, k, cos, sin = make(torch.bfloat16)
    assert not q.is_contiguous()
    for x, out in zip((q, k), rope(q, k, cos, sin), strict=True):
        assert out.stride() == x.stride()
        assert out.transpose(1, 2).is_contiguous()


@each_layout
def test_wider_angles_are_rounded_once(interleaved):
    q, k, cos, sin = make(torch.bfloat16, angle_dtype=torch.float32)
    found = rope(q, k, cos, sin, interleaved=interleaved)
    wanted = rope(q.float(), k.float(), cos, sin, interleaved=interleaved)
    for mine, right in zip(found, wanted, strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, right.bfloat16())


def test_inputs_stay():
    q, k, cos, sin = make(torch.float32)
    before = [x.detach().clone() for x in (q, k, cos, sin)]
    outputs = rope(q, k, cos, sin)
    torch.autograd.grad(outputs, (q, k), outputs)
    assert all(torch.equal(*pair) for pair in zip(before, (q, k, cos, sin), strict=True))


def test_what_is_kept_for_backward():
    q, k, cos, sin = make(torch.bfloat16, heads=(16, 4), length=30)
    assert saved_bytes(lambda: rope(q, k, cos, sin)) == cos.nbytes + sin.nbytes
    # The control: angles that train keep q and k
    trained = cos.clone().requires_grad_()
    assert saved_bytes(lambda: rope(q, k, trained, sin)) > q.nbytes


def test_backward_twice():
    q, k, cos, sin = make(torch.float32)
    out, _ = rope(q, k, cos, sin)
    first, second = (torch.autograd.grad(out, q, out.detach(), retain_graph=again)[0] for again in (True, False))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, q, out.detach())
    out, _ = rope(q, k, cos, sin)
    (first,) = torch.autograd.grad(out, q, torch.ones_like(out).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_angles_that_train():
    q, k, cos, sin = make(torch.float64)
    cos.requires_grad_()
    (grad,) = torch.autograd.grad(rope(q, k, cos, sin)[0].sum(), cos)
    assert torch.allclose(grad, q.sum(1))


@pytest.mark.parametrize(("heads", "length"), [((0, 0), 3), ((2, 1), 0), ((1, 1), 1), ((2, 0), 3)])
def test_empty_and_single(heads, length):
    q, k, cos, sin = make(torch.float32, heads=heads, length=length)
    outputs = rope(q, k, cos, sin)
    assert [x.shape for x in outputs] == [q.shape, k.shape]
    assert torch.autograd.grad(outputs[0].sum(), q)[0].shape == q.shape


def test_in_a_compiled_graph():
    q, k, cos, sin = make(torch.float32)
    fused = torch.compile(lambda q, k: rope(q, k, cos, sin), backend="aot_eager", fullgraph=True)
    for found, wanted in zip(fused(q, k), rope(q, k, cos, sin), strict=True):
        torch.testing.assert_close(found, wanted)


def test_back_is_the_derivative_of_there():
    q, _, cos, sin = make(torch.float64)
    y = torch.randn_like(q)
    (wanted,) = torch.autograd.grad(reference.rope_reference(q, cos, sin, True), q, y)
    torch.testing.assert_close(reference.rope_reference(y, cos, sin, True, back=True), wanted)


def test_what_does_not_fit_is_refused():
    q, k, cos, sin = make(torch.float32)
    with pytest.raises(ValueError, match=r"cos \[2, 5, 7\] and sin \[2, 5, 7\]; they must be"):
        rope(q, k, cos[..., :7], sin[..., :7])
    with pytest.raises(ValueError, match=r"k is \[2, 2, 4, 8\]|k \[2, 2, 4, 8\]"):
        rope(q, k[:, :, :4], cos, sin)
    with pytest.raises(ValueError, match="q and k must have one dtype"):
        rope(q, k.double(), cos, sin)
