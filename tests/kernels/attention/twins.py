"""The Triton kernels against plain torch, run by `tests/kernels/test_triton.py` in a process of their own."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from tests.kernels.attention.cases import CASES, SHARED, WIDTHS, Case, check, check_far
from tests.kernels.poison import poisoned
from trl_turbo.kernels.attention import passes, plan
from trl_turbo.kernels.attention.plan import Tile

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter computes bf16 wrongly
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So small that a few tokens are several blocks; keys in other numbers than queries."""
    tiles = {"forward": Tile(32, 16, 4, 2), "query": Tile(16, 32, 4, 2), "key": Tile(32, 16, 4, 2)}
    monkeypatch.setattr(plan, "chosen", {(name, 16): tile for name, tile in tiles.items()})


def forward_backward(case, tensors, segments=None):
    """All passes, into memory that is NaN before."""
    q, k, v, grad = tensors
    segments = segments or case.segments(DEVICE)
    before = [x.clone() for x in tensors]
    with poisoned():
        o, lse = passes.forward(q, k, v, segments, case.spec)
        found = [o, *passes.backward(grad, q, k, v, o, lse, segments, case.spec)]
    assert all(torch.equal(*pair) for pair in zip(before, tensors, strict=True))
    return found


@each_dtype
@each_case
def test_as_plain_torch(case, dtype):
    windowed = case.window is not None or case.softcap is not None
    if dtype == (torch.float32 if windowed else torch.float16):
        pytest.skip("the interpreter and the compiler are slow: half of the cases in each of these two")
    tensors = case.tensors(dtype, DEVICE)
    check(forward_backward(case, tensors), case, tensors)


@each_dtype
@pytest.mark.parametrize("case", WIDTHS.values(), ids=WIDTHS)
def test_widths(case, dtype):
    tensors = case.tensors(dtype, DEVICE)
    check(forward_backward(case, tensors), case, tensors)


LAYOUTS = {
    "slice of a fused projection": lambda x: torch.cat((x, x, x), 1)[:, x.shape[1] : 2 * x.shape[1]],
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda x: torch.stack((x, x), -1)[..., 0],
    "tokens apart": lambda x: torch.stack((x, x), 1)[:, 0],
    "broadcast": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout):
    case = Case([20, 17], [-1, 0])
    tensors = [layout(x) for x in case.tensors(torch.float32, DEVICE)]
    check(forward_backward(case, tensors), case, tensors)


def test_rows_too_far_apart_are_copied():
    """An offset inside of a tile is 32 bits wide."""
    x = torch.empty(1, device="meta").as_strided((3, 2, 16), (1 << 28, 16, 1))
    assert passes._rows(x).is_contiguous()
    assert passes._rows(x[:, :1].as_strided((3, 2, 16), (64, 16, 1))).stride() == (64, 16, 1)


@pytest.mark.parametrize("window", [None, 20])
def test_nothing_leaks_to_another_sequence(window):
    """NaN in all of one sequence, its neighbours in the same blocks, leaves every other bit as it was."""
    case = Case(*SHARED, window=window)
    clean = case.tensors(torch.float32, DEVICE)
    wanted = forward_backward(case, clean)
    start = sum(SHARED[0][:3])
    part = slice(start, start + SHARED[0][3])
    dirty = [x.clone() for x in clean]
    for x in dirty:
        x[part] = torch.nan
    prompt = slice(0, SHARED[0][0])
    for i, (x, y) in enumerate(zip(forward_backward_unchecked(case, dirty), wanted, strict=True)):
        assert x[part].isnan().all()
        kept = torch.ones(len(x), dtype=torch.bool)
        kept[part] = False
        if i >= 2:  # of keys and values those of the prompt, which it attends to
            kept[prompt] = False
        assert torch.equal(x[kept], y[kept])


def forward_backward_unchecked(case, tensors):
    with mock.patch.object(torch, "equal", return_value=True):  # NaN is not what it was
        return forward_backward(case, tensors)


def test_gradients_reach_their_own_sequence_alone():
    """From one completion they flow to it and to its prompt, and are 0 elsewhere to the bit."""
    case = Case(*SHARED)
    q, k, v, grad = case.tensors(torch.float32, DEVICE)
    start = sum(SHARED[0][:3])
    part = torch.zeros(len(q), dtype=torch.bool)
    part[start : start + SHARED[0][3]] = True
    prompt = torch.arange(len(q)) < SHARED[0][0]
    grad[~part] = 0
    _, grad_q, grad_k, grad_v = forward_backward(case, [q, k, v, grad])
    assert not grad_q[~part].any()
    for x in (grad_k, grad_v):
        assert not x[~(part | prompt)].any()
        assert x[part].any(-1).any(-1).all()
        assert x[prompt].any(-1).any(-1).all()


def test_gradients_are_the_same_each_time():
    case = Case([20, 17], [-1, 0])
    tensors = case.tensors(torch.float32, DEVICE)
    first, second = (forward_backward(case, tensors) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_control_what_nobody_writes_is_nan(monkeypatch):
    case = CASES["one head"]
    monkeypatch.setattr(passes, "forward_kernel", mock.MagicMock())
    q, k, v, _ = case.tensors(torch.float32, DEVICE)
    with poisoned():
        o, lse = passes.forward(q, k, v, case.segments(DEVICE), case.spec)
    assert o.isnan().all()
    assert lse.isnan().all()


def test_scores_far_below_zero():
    """Where 2^-lse overflows, what is not there, whose score is 0, must be left out before it is multiplied by 0."""
    case = Case([41, 30], [-1, 0])
    tensors = case.tensors(torch.float32, DEVICE)
    tensors[0].mul_(0.1).add_(8)
    tensors[1].mul_(0.1).sub_(8)
    found = forward_backward(case, tensors)
    assert all(x.isfinite().all() for x in found)
    check_far(found, case, tensors)


def test_scores_far_from_zero():
    """Peaks of some hundred, where exp alone would overflow, and rows whose first block is far below."""
    case = Case([40, 30], [-1, 0])
    tensors = case.tensors(torch.float32, DEVICE)
    tensors[0] *= 30
    tensors[1] *= torch.linspace(-3, 3, len(tensors[1]), device=DEVICE)[:, None, None]
    found = forward_backward(case, tensors)
    assert all(x.isfinite().all() for x in found)
    check_far(found, case, tensors)
