"""`attention` on the CPU, where plain torch serves, and `Segments`."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention.cases import CASES, SHARED, WIDTHS, Case, by_autograd, check
from trl_turbo import kernels
from trl_turbo.kernels.attention import Segments, attention, reference
from trl_turbo.kernels.attention.tables import key_work, query_tiles

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def run(case, tensors, dtype=None, **kwargs):
    q, k, v, grad = tensors
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
    o = attention(*leaves, case.segments(), **case.kwargs, **kwargs)
    return [o.detach(), *torch.autograd.grad(o, leaves, grad.to(o.dtype))]


@each_dtype
@each_case
def test_as_plain_torch_over_the_whole_mask(case, dtype):
    tensors = case.tensors(dtype)
    before = [x.clone() for x in tensors]
    # A gradient of keys is rounded for each sequence that sees them and each head of the group, and again where added
    check(run(case, tensors), case, tensors, roundings=4)
    assert all(torch.equal(*pair) for pair in zip(before, tensors, strict=True))


@each_case
def test_as_the_truth_in_float64(case):
    tensors = case.tensors(torch.float64)
    wanted = by_autograd(reference.attention_reference, case, tensors, torch.float64)
    for mine, truth in zip(run(case, tensors), wanted, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", WIDTHS.values(), ids=WIDTHS)
def test_widths(case):
    tensors = case.tensors(torch.float32)
    check(run(case, tensors), case, tensors)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}, {"window": 2, "softcap": 2.0}], ids=str)
def test_gradcheck(options):
    case = Case([4, 3, 0, 1], [-1, 0, 0, -1], heads=2, key_heads=1, width=4)
    q, k, v, _ = (x.requires_grad_() for x in case.tensors(torch.float64))
    segments = case.segments()
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, segments, **options), (q, k, v))


def test_the_mask_by_hand():
    """Prompt of two, completions of two and one: who sees whom, written out."""
    segments = Segments.build([2, 2, 1], [-1, 0, 0])
    rows = ["x....", "xx...", "xxx..", "xxxx.", "xx..x"]
    wanted = torch.tensor([[c == "x" for c in row] for row in rows])
    assert torch.equal(reference.mask_of(segments, None), wanted)
    assert segments.positions.tolist() == [0, 1, 2, 3, 2]
    windowed = torch.tensor([[c == "x" for c in row] for row in ["x....", "xx...", ".xx..", "..xx.", ".x..x"]])
    assert torch.equal(reference.mask_of(segments, 2), windowed)


def test_as_each_sequence_by_itself():
    """Every completion with its own copy of the prompt, through torch's attention: what sharing must not change."""
    lengths, prefix = SHARED
    case = Case(lengths, prefix)
    q, k, v, _ = case.tensors(torch.float64)
    segments = case.segments()
    o = attention(q, k, v, segments)
    prompt = torch.arange(lengths[0])
    for i, start in enumerate(segments.starts):
        own = torch.arange(start, start + lengths[i])
        rows = own if prefix[i] < 0 else torch.cat((prompt, own))
        alone = (x[rows].transpose(0, 1)[None] for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
        wanted = torch.nn.functional.scaled_dot_product_attention(*alone, is_causal=True)[0].transpose(0, 1)
        torch.testing.assert_close(o[own], wanted[len(rows) - len(own) :])
        assert torch.equal(segments.positions[own], torch.arange(len(rows) - len(own), len(rows)))


def test_nothing_leaks_to_another_sequence():
    case = Case(*SHARED)
    clean = case.tensors(torch.float32)
    wanted = run(case, clean)
    start = sum(SHARED[0][:3])
    part = slice(start, start + SHARED[0][3])
    dirty = [x.clone() for x in clean]
    for x in dirty:
        x[part] = torch.nan
    for i, (x, y) in enumerate(zip(run(case, dirty), wanted, strict=True)):
        kept = torch.ones(len(x), dtype=torch.bool)
        kept[part] = False
        if i >= 2:
            kept[: SHARED[0][0]] = False
        assert torch.equal(x[kept], y[kept])
        assert x[part].isnan().all()


def test_backward_twice():
    case = CASES["mixed"]
    q, k, v, grad = (x.requires_grad_() for x in case.tensors(torch.float32))
    o = attention(q, k, v, case.segments())
    first = torch.autograd.grad(o, (q, k, v), grad, retain_graph=True)
    second = torch.autograd.grad(o, (q, k, v), grad)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(lengths):
    q, k, v = (torch.randn(0, n, 8, requires_grad=True) for n in (4, 2, 2))
    segments = Segments.build(lengths)
    o = attention(q, k, v, segments)
    assert o.shape == (0, 4, 8)
    assert all(x.shape[0] == 0 for x in torch.autograd.grad(o.sum(), (q, k, v)))
    assert segments.total == 0
    assert query_tiles(segments, 16, None).shape == (0, 6)
    assert key_work(segments, 16, 16, 2, 1, None, 4).items.shape == (0, 8)


def test_autocast_casts_as_torchs_own():
    case = Case([9, 4], [-1, 0])
    q, k, v, _ = case.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o = attention(q, k.bfloat16(), v, case.segments())
        assert attention(*(x.double() for x in (q, k, v)), case.segments()).dtype == torch.float64
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), case.segments()))


def test_a_plugins_own_serves():
    case = Case([9, 4], [-1, 0])
    q, k, v, _ = case.tensors(torch.float32)
    seen = {}

    def mine(*args, **kwargs):
        seen.update(kwargs)
        return args[0]

    kernels.set_override("attention", "cpu", "float32", mine)
    try:
        assert attention(q, k, v, case.segments(), window=3) is q
    finally:
        kernels.clear_overrides()
    assert seen == {"scale": 0.25, "window": 3, "softcap": None, "deterministic": False}


def test_in_a_compiled_graph():
    case = Case([9, 4], [-1, 0])
    q, k, v, _ = case.tensors(torch.float32)
    segments = case.segments()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, segments), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, segments))


@pytest.mark.parametrize(
    ("lengths", "prefix", "message"),
    [
        ([3, -1], None, "Segment 1 has -1 tokens"),
        ([3, 1], [-1], "There are 2 lengths and 1 prefixes"),
        ([3, 1], [-1, 2], "Segment 1's prefix is 2; name one of the 2 segments"),
        ([3, 1], [-1, 1], "Segment 1's prefix 1 has the prefix 1; a prefix must have none itself"),
        ([3, 1, 1], [-1, 0, 1], "Segment 2's prefix 1 has the prefix 0; a prefix must have none itself"),
    ],
)
def test_segments_that_do_not_fit_are_refused(lengths, prefix, message):
    with pytest.raises(ValueError, match=message):
        Segments.build(lengths, prefix)


def test_what_does_not_fit_is_refused():
    segments = Segments.build([3, 2])

    def refused(message, q=(5, 4, 8), k=(5, 2, 8), v=None, dtype=torch.float32, **kwargs):
        tensors = torch.ones(q), torch.ones(k, dtype=dtype), torch.ones(v or k)
        with pytest.raises(ValueError, match=message):
            attention(*tensors, segments, **kwargs)

    refused("q has 4 tokens and the segments 5", q=(4, 4, 8), k=(4, 2, 8))
    refused(r"q is \[5, 4, 8\], k \[5, 2, 4\]", k=(5, 2, 4))
    refused(r"v \[5, 1, 8\]", v=(5, 1, 8))
    refused("q has 4 heads and k 3; the latter must divide", k=(5, 3, 8))
    refused("heads are 264 wide; this attention takes up to 256", q=(5, 4, 264), k=(5, 2, 264))
    refused("they must have one floating dtype", dtype=torch.float64)
    refused("The window must be at least 1", window=0)
    refused("The softcap must be above 0", softcap=0.0)
    refused("The scale must be above 0", scale=-1.0)
    with pytest.raises(ValueError, match="k on meta"):
        attention(torch.ones(5, 4, 8), *(torch.ones(5, 2, 8, device="meta") for _ in range(2)), segments)
