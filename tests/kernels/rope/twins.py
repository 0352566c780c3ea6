"""The Triton kernel against plain torch, run by `tests/kernels/test_triton.py` in a process of their own."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels.poison import poisoned
from trl_turbo.kernels.rope import kernel, reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter computes bf16 wrongly
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
#: B, H, Hk, T, D, R
SHAPES = [
    (1, 1, 1, 1, 2, 2),
    (2, 4, 2, 5, 16, 16),
    (2, 12, 2, 7, 128, 128),
    (1, 5, 3, 9, 96, 96),
    (3, 3, 1, 4, 64, 16),
    (2, 2, 2, 3, 80, 32),
    (1, 33, 1, 2, 256, 256),
    (2, 3, 3, 5, 24, 18),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("interleaved", [False, True])
each_way = pytest.mark.parametrize("back", [False, True])


def make(shape, dtype, angle_dtype=None, batch_angles=False):
    """q and k as projections give them, [B, T, H, D] in memory, and cos and sin that differ in each column."""
    batch, heads, k_heads, length, width, turned = shape
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, length, n, width, generator=g).to(DEVICE, dtype) for n in (heads, k_heads))
    angles = torch.randn(2, batch if batch_angles else 1, length, turned, generator=g).to(DEVICE, angle_dtype or dtype)
    return q.transpose(1, 2), k.transpose(1, 2), angles[0], angles[1]


def check(q, k, cos, sin, interleaved, back):
    before = [x.clone() for x in (q, k, cos, sin)]
    with poisoned():
        found = kernel.turn(q, k, cos, sin, interleaved=interleaved, back=back)
    wanted = reference.turn(q, k, cos, sin, interleaved=interleaved, back=back)
    for x, mine, right in zip((q, k), found, wanted, strict=True):
        assert mine.dtype == x.dtype
        assert mine.stride() == torch.empty_like(x).stride()
        if q.dtype == torch.float32 or cos.dtype != q.dtype:
            # The compiler may leave out the rounding of a product before a sum in float32
            truth = reference.rope_reference(x.double(), cos.double(), sin.double(), interleaved, back=back)
            size = (x.double().abs().amax() * cos.double().abs().amax().maximum(sin.double().abs().amax())).item()
            assert (mine.double() - truth).abs().amax() <= (right.double() - truth).abs().amax() + 4 * 2**-24 * size
        else:
            assert torch.equal(mine, right)
    assert all(torch.equal(*pair) for pair in zip(before, (q, k, cos, sin), strict=True))


@each_way
@each_layout
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_plain_torch(shape, dtype, interleaved, back):
    check(*make(shape, dtype), interleaved, back)


@each_way
@pytest.mark.parametrize(("dtype", "angles"), itertools.permutations(DTYPES, 2), ids=str)
def test_angles_of_another_dtype_and_for_each_sequence(dtype, angles, back):
    check(*make(SHAPES[1], dtype, angles, batch_angles=True), False, back)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "slice of a fused projection": lambda x: torch.cat((x, x), 1)[:, x.shape[1] :],
    "rows apart": lambda x: torch.stack((x, x), 3)[:, :, :, 0],
    "broadcast": lambda x: x[:1, :, :1].expand(x.shape),
}


@each_way
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout, back):
    q, k, cos, sin = make(SHAPES[1], torch.float16, batch_angles=True)
    check(layout(q), k, cos, sin, False, back)
    check(q, layout(k), cos, sin, True, back)
    check(q, k, cos[:1].expand_as(cos), sin[:, :1].expand_as(sin), False, back)


@each_layout
def test_back_is_the_transpose(interleaved):
    """<turn(x), y> is <x, back(y)>, for cos and sin that are no angles' too."""
    q, k, cos, sin = make(SHAPES[4], torch.float32)
    y, z = torch.randn_like(q), torch.randn_like(k)
    there = kernel.turn(q, k, cos, sin, interleaved=interleaved, back=False)
    back = kernel.turn(y, z, cos, sin, interleaved=interleaved, back=True)
    for x, turned, other, turned_back in zip((q, k), there, (y, z), back, strict=True):
        left, right = (turned.double() * other).sum(), (x.double() * turned_back).sum()
        assert (left - right).abs() <= 1e-5 * (turned.double() * other).abs().sum()


def test_more_heads_than_a_tile(monkeypatch):
    monkeypatch.setattr(kernel, "TILE", 32)
    check(*make(SHAPES[2], torch.float16), False, False)
