"""Attention on a GPU: every width and dtype, long rows, offsets beyond 2^31, grids, streams, graphs, and memory."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention.cases import CASES, Case, check
from trl_turbo.kernels.attention import Segments, attention, batches, reference
from trl_turbo.kernels.linear_logprob.reference import excess_error

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: `tox run -e gpu` needs one", allow_module_level=True)

pytest.importorskip("triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LENGTHS, PREFIX = [300, 0, 517, 128, 1, 64, 259], [-1, 0, 0, -1, 3, 0, -1]
BOTH = {"window": 70, "softcap": 5.0}
# Compiling takes seconds each: every width and every dtype, options in turn
FORMS = [
    *((BF16, width, options) for width in (16, 64, 80, 96, 128, 256) for options in ({}, BOTH)),
    *((FP16, width, {"window": 200}) for width in (40, 64, 128, 192)),
    *((FP32, width, {"softcap": 5.0}) for width in (16, 64, 128, 256)),
    (FP32, 128, {}),
]


def room(gib):
    if torch.cuda.mem_get_info()[0] < gib << 30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def run(case, tensors, segments=None, **kwargs):
    q, k, v, grad = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attention(*leaves, segments or case.segments("cuda"), **case.kwargs, **kwargs)
    return [o.detach(), *torch.autograd.grad(o, leaves, grad)]


@pytest.mark.parametrize(("dtype", "width", "options"), FORMS, ids=str)
def test_as_plain_torch(dtype, width, options):
    """Each compiles, fits into shared memory and registers, and is right, with the tiles that are chosen here."""
    case = Case(LENGTHS, PREFIX, width=width, **options)
    tensors = case.tensors(dtype, "cuda")
    before = [x.clone() for x in tensors]
    check(run(case, tensors), case, tensors)
    assert all(torch.equal(*pair) for pair in zip(before, tensors, strict=True))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_small_ones(case):
    tensors = case.tensors(BF16, "cuda")
    check(run(case, tensors), case, tensors)


def test_the_kernels_serve(monkeypatch):
    monkeypatch.setattr(batches, "attention_in_batches", None)
    case = CASES["mixed"]
    run(case, case.tensors(BF16, "cuda"))
    with pytest.raises(TypeError):
        run(case, case.tensors(torch.float64, "cuda"))


def test_long_rows():
    """A row of 40,000 tokens, of which the last thousand queries and all keys are compared."""
    case = Case([40_000], heads=2, key_heads=1, width=128)
    q, k, v, grad = case.tensors(BF16, "cuda")
    grad[:-1000] = 0
    o, grad_q, grad_k, grad_v = run(case, (q, k, v, grad))

    def by_torch(dtype):
        leaves = [x.to(dtype).transpose(0, 1).requires_grad_() for x in (q[-1000:], k, v)]
        mask = torch.arange(39_000, 40_000, device="cuda")[:, None] >= torch.arange(40_000, device="cuda")[None, :]
        o = reference.attend(*leaves, mask, case.spec)
        grads = torch.autograd.grad(o, leaves, grad[-1000:].to(dtype).transpose(0, 1))
        return [x.transpose(0, 1) for x in (o.detach(), *grads)]

    found = o[-1000:], grad_q[-1000:], grad_k, grad_v
    for mine, plain, truth in zip(found, by_torch(BF16), by_torch(torch.float64), strict=True):
        assert excess_error(mine, plain, truth) <= 1
    assert not grad_q[:-1000].any()


def test_more_segments_than_a_grids_second_dimension_takes():
    """One token each: its own value comes back, to the bit."""
    case = Case([1] * 70_001, heads=1, key_heads=1, width=64)
    q, k, v, grad = case.tensors(BF16, "cuda")
    o, grad_q, grad_k, grad_v = run(case, (q, k, v, grad))
    assert torch.equal(o, v)
    assert torch.equal(grad_v, grad)
    # p (grad_p - delta) with both of them the same sum, in another order
    assert grad_q.abs().max() <= 1e-4
    assert grad_k.abs().max() <= 1e-4


def test_rows_beyond_2_31_elements():
    room(60)
    lengths = [4096] * 34 + [1500]
    heads, last = 128, slice(4096 * 34, None)
    total = sum(lengths)
    q, grad = (torch.empty(total, heads, 128, device="cuda", dtype=BF16).normal_() for _ in range(2))
    k, v = (torch.empty(total, 2, 128, device="cuda", dtype=BF16).normal_() for _ in range(2))
    assert q.numel() > 1 << 31
    case = Case(lengths, heads=heads, key_heads=2, width=128)
    found = run(case, (q, k, v, grad))
    alone = Case([1500], heads=heads, key_heads=2, width=128)
    part = [x[last].clone() for x in (q, k, v, grad)]
    check([x[last] for x in found], alone, part)


def test_strides_beyond_2_31_elements():
    """Tokens 2^30 elements apart: the third begins at 2^31."""
    room(12)
    case = Case([3], heads=1, key_heads=1, width=128)
    wide = []
    for x in case.tensors(BF16, "cuda"):
        far = torch.empty(2 * 2**30 + 128, device="cuda", dtype=BF16).as_strided((3, 1, 128), (2**30, 128, 1))
        wide.append(far.copy_(x) if len(wide) < 2 else x)
    assert all(torch.equal(*pair) for pair in zip(run(case, wide), run(case, case.tensors(BF16, "cuda")), strict=True))


def test_gradients_are_the_same_each_time():
    case = Case([2048] + [512] * 8, [-1] + [0] * 8, heads=12, key_heads=2, width=128)
    tensors = case.tensors(BF16, "cuda")
    first = run(case, tensors)
    for _ in range(5):
        assert all(torch.equal(*pair) for pair in zip(first, run(case, tensors), strict=True))


def test_nothing_leaks_to_another_sequence():
    case = Case(LENGTHS, PREFIX, width=64)
    clean = case.tensors(BF16, "cuda")
    wanted = run(case, clean)
    part = slice(300, 817)
    dirty = [x.clone() for x in clean]
    for x in dirty:
        x[part] = torch.nan
    for i, (x, y) in enumerate(zip(run(case, dirty), wanted, strict=True)):
        kept = torch.ones(len(x), dtype=torch.bool)
        kept[part] = False
        if i >= 2:
            kept[:300] = False
        assert x[part].isnan().all()
        assert torch.equal(x[kept], y[kept])


def test_memory_is_that_of_the_results():
    """No scores: the result, a float32 a row and head, and in backward the gradients and the sums of parts."""
    case = Case([16_384], heads=12, key_heads=2, width=128)
    q, k, v, grad = case.tensors(BF16, "cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    segments = case.segments("cuda")
    torch.autograd.grad(attention(*leaves, segments), leaves, grad)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o = attention(*leaves, segments)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= q.nbytes + 12 * 16_384 * 4 + (1 << 20)
    torch.autograd.grad(o, leaves, grad)
    parts = 2 * 12 * 16_384 * 128 * 4 * 1.5
    assert torch.cuda.max_memory_allocated() - before <= kept + 2 * q.nbytes + 4 * k.nbytes + parts + (8 << 20)


def test_on_a_stream_of_its_own():
    case = CASES["mixed"]
    tensors = case.tensors(BF16, "cuda")
    wanted = run(case, tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(case, tensors)
    stream.synchronize()
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_in_a_graph():
    """Once its tables are there, nothing waits for the device."""
    case = CASES["mixed"]
    tensors, segments = case.tensors(BF16, "cuda"), case.segments("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wanted = run(case, tensors, segments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(case, tensors, segments)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_no_tokens():
    segments = Segments.build([0], device="cuda")
    q, k, v = (torch.randn(0, n, 64, device="cuda", requires_grad=True) for n in (4, 2, 2))
    attention(q, k, v, segments).sum().backward()
    assert k.grad.shape == k.shape
