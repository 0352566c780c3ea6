"""A batch without padding, as torch's own attention computes it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from trl_turbo.kernels.attention import Segments, attention, dense, reference
from trl_turbo.kernels.attention.spec import Spec
from trl_turbo.kernels.linear_logprob.reference import excess_error

SPEC = Spec(0.25, None, None, False)


def test_even_segments():
    assert Segments.build([4, 4, 4]).even
    assert Segments.build([7]).even
    for lengths, prefix in (([4, 4, 3], None), ([4, 4], [-1, 0]), ([0, 0], None), ([], None)):
        assert not Segments.build(lengths, prefix).even


def test_torchs_own_attention_is_that_of_the_segments(monkeypatch):
    monkeypatch.setattr(dense, "BACKENDS", [SDPBackend.MATH])
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(15, heads, 8, generator=g, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    segments = Segments.build([5, 5, 5])
    found, truth = dense.attend(q, k, v, segments, SPEC), reference.attention_reference(q, k, v, segments, SPEC)
    torch.testing.assert_close(found, truth)
    grad = torch.randn(found.shape, generator=g, dtype=torch.float64)
    for mine, right in zip(*(torch.autograd.grad(y, (q, k, v), grad) for y in (found, truth)), strict=True):
        torch.testing.assert_close(mine, right)


def test_what_is_not_left_to_it():
    q = torch.empty(8, 2, 64, dtype=torch.bfloat16)
    assert not dense.serves(q, Segments.build([4, 4]), SPEC), "there is no cuDNN on a CPU"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cudnn_is_as_near_the_truth_as_plain_torch(dtype, width):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("measured on Hopper alone")
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (torch.randn(1200, h, width, generator=g, device="cuda", dtype=dtype) for h in (4, 2, 2, 4))
    segments = Segments.build([400] * 3, device="cuda")
    spec = Spec(width**-0.5, None, None, False)
    assert dense.serves(q, segments, spec)
    for other in (Spec(1.0, 5, None, False), Spec(1.0, None, 3.0, False), Spec(1.0, None, None, True)):
        assert not dense.serves(q, segments, other)
    assert not dense.serves(q, Segments.build([400, 800], device="cuda"), spec)

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))

    by_segment = lambda *x: reference.attention_reference(*x, segments, spec)  # noqa: E731
    with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
        truth, plain = run(by_segment, torch.float64), run(by_segment, dtype)
    for mine, theirs, right in zip(run(lambda *x: attention(*x, segments), dtype), plain, truth, strict=True):
        assert mine.dtype == dtype
        assert excess_error(mine, theirs, right, 0.1) <= 1
