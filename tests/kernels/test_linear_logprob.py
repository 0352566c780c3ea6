"""`linear_logprob` against the whole logits in plain torch, on the CPU and, where there is one, on a GPU.

The rule: against float64 an error may exceed that of plain torch in the same dtype only by the slack of `excess_error`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_turbo.kernels import clear_overrides, set_override
from trl_turbo.kernels.linear_logprob import OUTPUTS, LinearLogprobOutput, linear_logprob
from trl_turbo.kernels.linear_logprob.reference import excess_error, linear_logprob_reference

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
    ),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("hidden", "weight", "bias", "a", "b")
# Enough elements for an average error to be one, and still ragged
FAIR = {"n": 251, "v": 509, "h": 72}
TRANSFORMS = [{}, {"temperature": 0.7, "logit_scale": 1.5}, {"temperature": 1.2, "softcap": 4.0, "logit_scale": -2.0}]


def make(device, dtype, n=37, v=211, h=24, r=4, seed=0, spread=2.5):
    g = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (n, h), "weight": (v, h), "bias": (v,), "a": (n, r), "b": (v, r)}
    scale = {"hidden": 1.0, "weight": spread / h**0.5, "bias": 0.5, "a": 1.0, "b": 0.3}
    tensors = {k: (torch.randn(s, generator=g) * scale[k]).to(device, dtype) for k, s in shapes.items()}
    targets = torch.randint(0, v, (n,), generator=g).to(device)
    grads = [(torch.randn(n, generator=g) / max(n, 1)).to(device) for _ in range(2)]
    return tensors, targets, grads


def call(fn, tensors, targets, use_bias, use_low_rank, **kw):
    kw["bias"] = tensors["bias"] if use_bias else None
    kw["low_rank"] = (tensors["a"], tensors["b"]) if use_low_rank else None
    return fn(tensors["hidden"], tensors["weight"], targets, **kw)


def loss(out, grads, entropy_grad):
    total = (out.logps * grads[0]).sum()
    return total + (out.entropy * grads[1]).sum() if entropy_grad else total


def compare(device, dtype, needs, use_bias, use_low_rank, entropy_grad, transform, byte_budget=None, **sizes):
    tensors, targets, grads = make(device, dtype, **sizes)
    results = []
    for fn, cast in (
        (linear_logprob, dtype),
        (linear_logprob_reference, dtype),
        (linear_logprob_reference, torch.float64),
    ):
        leaves = {k: t.detach().to(cast).requires_grad_(k in needs) for k, t in tensors.items()}
        if fn is linear_logprob:
            kw = {"outputs": OUTPUTS, "entropy_grad": entropy_grad, "byte_budget": byte_budget}
        else:
            kw = {}
        out = call(fn, leaves, targets, use_bias, use_low_rank, **transform, **kw)
        answer = dict(zip(OUTPUTS, out, strict=True))
        if needs:
            loss(out, grads, entropy_grad).backward()
            answer |= {f"grad {k}": leaves[k].grad for k in needs}
        results.append(answer)
    found, plain, truth = results
    for name in found:
        if name == "top1":
            assert torch.equal(found[name], plain[name])
            continue
        assert found[name].dtype == (dtype if name.startswith("grad") else torch.float32)
        excess = excess_error(found[name], plain[name], truth[name])
        assert excess <= 1, f"{name}: {excess:.2f} of the allowed error"


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize(
    ("needs", "use_bias", "use_low_rank"),
    [
        ((), True, True),
        (("hidden",), False, False),
        (("hidden",), True, True),
        (("hidden", "a"), True, True),
        (("a",), False, True),
        (("hidden", "weight"), False, False),
        (("weight", "bias"), True, False),
        (("hidden", "a", "b"), False, True),
        (NAMES, True, True),
    ],
    ids=str,
)
def test_values_and_gradients(device, dtype, transform, needs, use_bias, use_low_rank):
    compare(device, dtype, needs, use_bias, use_low_rank, False, transform, byte_budget=100_000, **FAIR)


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("needs", [("hidden",), ("weight",), NAMES], ids=str)
def test_entropy_gradient(device, dtype, transform, needs):
    compare(device, dtype, needs, True, True, True, transform, byte_budget=100_000, **FAIR)


@on_each_device
@pytest.mark.parametrize(
    "sizes", [{"n": 1}, {"v": 1}, {"h": 1}, {"n": 1, "v": 2, "h": 1}, {"n": 129, "v": 1031, "h": 65}], ids=str
)
@pytest.mark.parametrize("byte_budget", [1, 10_000, None])
def test_ragged_sizes(device, sizes, byte_budget):
    if byte_budget == 1:  # one logit a tile where there are few, instead of thousands of tiles elsewhere
        byte_budget = max(sizes.get("n", 37) * sizes.get("v", 211) // 10, 1) if sizes != {"n": 1, "v": 2, "h": 1} else 1
    compare(device, torch.float32, NAMES, True, True, False, {}, byte_budget=byte_budget, **sizes)


@on_each_device
def test_no_rows(device):
    tensors, targets, _ = make(device, torch.float32, n=0)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    out = call(linear_logprob, leaves, targets, True, True, outputs=OUTPUTS, entropy_grad=True)
    assert all(x.shape == (0,) for x in out)
    (out.logps.sum() + out.entropy.sum()).backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in leaves.values())


@on_each_device
def test_strides_and_inputs_stay(device):
    tensors, targets, grads = make(device, torch.float32)
    wanted = call(linear_logprob, tensors, targets, True, True, outputs=OUTPUTS)
    odd = {
        "hidden": tensors["hidden"].repeat_interleave(2, 0)[::2],
        "weight": tensors["weight"].t().contiguous().t(),
        "bias": tensors["bias"].repeat_interleave(3)[::3],
        "a": tensors["a"].repeat_interleave(2, 1)[:, ::2],
        "b": tensors["b"].flip(0).flip(0).t().contiguous().t(),
    }
    before = {k: t.clone() for k, t in odd.items()}
    leaves = {k: t.requires_grad_() for k, t in odd.items()}
    out = call(linear_logprob, leaves, targets.repeat_interleave(2)[::2], True, True, outputs=OUTPUTS)
    loss(out, [g.repeat_interleave(2)[::2] for g in grads], False).backward()
    assert torch.equal(out.top1, wanted.top1)
    for found, expected in zip(out[:5], wanted[:5], strict=True):
        assert excess_error(found, expected, expected) <= 1
    assert all(torch.equal(t, before[k]) for k, t in leaves.items())
    assert all(t.grad is not None for t in leaves.values())
    one_row = tensors["hidden"][:1].expand(5, -1)
    out = linear_logprob(one_row, tensors["weight"], targets[:5])
    assert (
        excess_error(out.logps, out.logps, linear_logprob_reference(one_row, tensors["weight"], targets[:5]).logps) <= 1
    )


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight"), NAMES], ids=str)
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_gradcheck(needs, entropy_grad, transform):
    tensors, targets, _ = make("cpu", torch.float64, n=4, v=11, h=3, r=2)
    leaves = {k: t.requires_grad_(k in needs) for k, t in tensors.items()}

    def fn(*_):
        out = call(
            linear_logprob,
            leaves,
            targets,
            True,
            True,
            outputs=("logps", "entropy"),
            entropy_grad=entropy_grad,
            byte_budget=200,
            **transform,
        )
        return (out.logps, out.entropy) if entropy_grad else out.logps

    assert torch.autograd.gradcheck(fn, [leaves[k] for k in needs])


def test_tied_weight_gets_both_gradients():
    tensors, targets, grads = make("cpu", torch.float64)
    results = []
    for fn in (linear_logprob, linear_logprob_reference):
        weight = tensors["weight"].clone().requires_grad_()
        hidden = torch.nn.functional.embedding(targets, weight).tanh()
        (fn(hidden, weight, targets).logps * grads[0]).sum().backward()
        results.append(weight.grad)
    torch.testing.assert_close(*results)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master", [torch.float32, None])
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=str)
def test_autocast(device, dtype, master, needs):
    """fp32 master weights under autocast, with fp32 or already low hidden states; gradients come back in their
    dtypes.
    """
    tensors, targets, grads = make(device, torch.float32, **FAIR)
    truth = {k: t.double().requires_grad_(k in needs) for k, t in tensors.items()}
    out = call(linear_logprob_reference, truth, targets, True, False)
    loss(out, grads, False).backward()
    found = []
    for fn in (linear_logprob, None):
        leaves = {k: t.clone().requires_grad_(k in needs) for k, t in tensors.items()}
        with torch.autocast(device, dtype=dtype):
            hidden = leaves["hidden"] if master else leaves["hidden"].to(dtype)
            if fn is not None:
                result = fn(hidden, leaves["weight"], targets, bias=leaves["bias"]).logps
            else:
                logits = torch.nn.functional.linear(hidden, leaves["weight"], leaves["bias"])
                result = logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
            assert result.dtype == torch.float32
        (result * grads[0]).sum().backward()
        assert all(leaves[k].grad.dtype == torch.float32 for k in needs)
        found.append({"logps": result.detach(), **{k: leaves[k].grad for k in needs}})
    truth_values = {"logps": out.logps.detach(), **{k: truth[k].grad for k in needs}}
    for name, wanted in truth_values.items():
        assert excess_error(found[0][name], found[1][name], wanted) <= 1, name


@on_each_device
def test_fp32_head_with_low_hidden(device):
    """The head is cast a tile at a time to the dtype of the hidden states."""
    tensors, targets, _ = make(device, torch.float32)
    hidden = tensors["hidden"].bfloat16().requires_grad_()
    weight = tensors["weight"].requires_grad_()
    linear_logprob(hidden, weight, targets, byte_budget=3000).logps.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    same = linear_logprob(hidden, weight.bfloat16(), targets, byte_budget=3000).logps
    assert torch.equal(same, linear_logprob(hidden, weight, targets, byte_budget=3000).logps)


@on_each_device
def test_float16_gradients_do_not_underflow(device):
    """Without a scaler, g = 1e-6 times p is below float16's smallest number; the sums are not."""
    tensors, targets, _ = make(device, torch.float16)
    results = []
    for factor in (1.0, 2.0**-20):
        weight = tensors["weight"].float().requires_grad_()
        (linear_logprob(tensors["hidden"], weight, targets).logps.sum() * factor).backward()
        results.append(weight.grad / factor)
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


@on_each_device
def test_second_backward(device):
    tensors, targets, grads = make(device, torch.float32)
    for needs, entropy_grad in itertools.product((("hidden",), NAMES), (False, True)):
        leaves = {k: t.clone().requires_grad_(k in needs) for k, t in tensors.items()}
        out = call(linear_logprob, leaves, targets, True, True, outputs=("logps", "entropy"), entropy_grad=entropy_grad)
        total = loss(out, grads, entropy_grad)
        inputs = [leaves[k] for k in needs]
        first = torch.autograd.grad(total, inputs, retain_graph=True)
        second = torch.autograd.grad(total, inputs)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(total, inputs)


def test_double_backward_raises():
    tensors, targets, _ = make("cpu", torch.float32)
    hidden = tensors["hidden"].requires_grad_()
    (grad,) = torch.autograd.grad(
        linear_logprob(hidden, tensors["weight"], targets).logps.square().sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiat"):
        grad.sum().backward()


def test_only_what_is_asked():
    tensors, targets, _ = make("cpu", torch.float32)
    hidden = tensors["hidden"].requires_grad_()
    for name in OUTPUTS:
        out = linear_logprob(hidden, tensors["weight"], targets, outputs=(name,))
        assert [field for field, x in zip(OUTPUTS, out, strict=True) if x is not None] == [name]
        assert getattr(out, name).requires_grad == (name == "logps")
    out = linear_logprob(hidden, tensors["weight"], targets, outputs=("logps", "entropy"), entropy_grad=True)
    assert out.entropy.requires_grad
    with torch.no_grad():
        assert not linear_logprob(hidden, tensors["weight"], targets).logps.requires_grad


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@on_each_device
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("needs", [(), ("hidden",), NAMES], ids=str)
def test_never_all_logits(device, entropy_grad, needs):
    """Nor anything else of that size: the largest tensor is a gradient, or a tile within the budget."""
    n, v, h = 512, 2048, 8
    tensors, targets, grads = make(device, torch.float32, n=n, v=v, h=h)
    leaves = {k: t.requires_grad_(k in needs) for k, t in tensors.items()}
    with Largest() as seen:
        out = call(
            linear_logprob, leaves, targets, True, True, outputs=OUTPUTS, entropy_grad=entropy_grad, byte_budget=2**18
        )
        if needs:
            loss(out, grads, entropy_grad).backward()
    assert seen.elements <= max(2**18 // 4, v * h)
    assert seen.elements < n * v // 8


@on_each_device
def test_minus_infinity_bias(device):
    """Padded vocabulary ruled out by the bias, from the first tile on."""
    tensors, targets, _ = make(device, torch.float32, v=300)
    tensors["bias"][:150] = -torch.inf
    targets = targets % 150 + 150
    hidden = tensors["hidden"].requires_grad_()
    out = linear_logprob(
        hidden,
        tensors["weight"],
        targets,
        bias=tensors["bias"],
        outputs=("logps", "entropy"),
        entropy_grad=True,
        byte_budget=2000,
    )
    wanted = linear_logprob_reference(
        hidden.detach(), tensors["weight"][150:], targets - 150, bias=tensors["bias"][150:]
    )
    assert excess_error(out.logps, wanted.logps, wanted.logps) <= 1
    assert excess_error(out.entropy, wanted.entropy, wanted.entropy) <= 1
    (out.logps + out.entropy).sum().backward()
    assert hidden.grad.isfinite().all()


def test_bad_input_says_why():
    tensors, targets, _ = make("cpu", torch.float32)
    hidden, weight = tensors["hidden"], tensors["weight"]
    cases = [
        (ValueError, "flatten", (hidden[None], weight, targets), {}),
        (ValueError, "head_logprob", (hidden, weight[None], targets), {}),
        (ValueError, "24 features and weight takes 23", (hidden, weight[:, 1:], targets), {}),
        (ValueError, "no vocabulary", (hidden, weight[:0], targets), {}),
        (ValueError, "one token for each row", (hidden, weight, targets[1:]), {}),
        (TypeError, "long", (hidden, weight, targets.int()), {}),
        (ValueError, "A target is -1", (hidden, weight, targets - 1 - targets[0]), {}) if targets.min() < 1 else None,
        (ValueError, "A target is 211 and the head has 211", (hidden, weight, targets.clone().fill_(211)), {}),
        (ValueError, "A target is -100", (hidden, weight, targets.clone().fill_(-100)), {}),
        (TypeError, "int64", (hidden.long(), weight, targets), {}),
        (TypeError, "quantised", (hidden, weight.to(torch.int8), targets), {}),
        (ValueError, "bias must be", (hidden, weight, targets), {"bias": torch.zeros(3)}),
        (ValueError, r"low_rank\[1\]", (hidden, weight, targets), {"low_rank": (tensors["a"], tensors["b"][:, 1:])}),
        (ValueError, r"low_rank\[0\]", (hidden, weight, targets), {"low_rank": (tensors["a"][1:], tensors["b"])}),
        (ValueError, "temperature", (hidden, weight, targets), {"temperature": 0.0}),
        (ValueError, "softcap", (hidden, weight, targets), {"softcap": -1.0}),
        (ValueError, "logit scale", (hidden, weight, targets), {"logit_scale": float("nan")}),
        (ValueError, "no output 'logits'", (hidden, weight, targets), {"outputs": ("logits",)}),
        (ValueError, "no outputs", (hidden, weight, targets), {"outputs": ()}),
        (ValueError, "byte budget", (hidden, weight, targets), {"byte_budget": -1}),
        (ValueError, "on meta", (hidden, weight.to("meta"), targets), {}),
        (ValueError, "on meta", (hidden, weight, targets.to("meta")), {}),
    ]
    for error, words, args, kw in filter(None, cases):
        with pytest.raises(error, match=words) as caught:
            linear_logprob(*args, **kw)
        assert str(caught.value).endswith(".")
        assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_targets_outside_on_cuda():
    tensors, targets, _ = make("cuda", torch.bfloat16)
    targets[3] = 10**9
    hidden = tensors["hidden"].requires_grad_()
    out = linear_logprob(hidden, tensors["weight"], targets)
    assert out.logps.isnan().nonzero().tolist() == [[3]]
    out.logps.sum().backward()
    assert hidden.grad.isnan().any(-1).nonzero().tolist() == [[3]]
    with pytest.raises(ValueError, match="A target is 1000000000"):
        linear_logprob(hidden, tensors["weight"], targets, check_targets=True)
    with pytest.raises(ValueError, match="move hidden to the head's device"):
        linear_logprob(hidden.cpu(), tensors["weight"], targets.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight"), ("hidden", "a", "b")], ids=str)
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_full_size_tiles(needs, entropy_grad):
    """Default tiles, several in each direction, the last of both ragged."""
    use_low_rank = "a" in needs
    compare("cuda", torch.bfloat16, needs, False, use_low_rank, entropy_grad, {}, n=5003, v=20_011, h=512, r=16)


def test_override_takes_the_call():
    tensors, targets, _ = make("cpu", torch.float32)
    try:
        set_override("linear_logprob", "cpu", "float32", lambda *args, **kw: LinearLogprobOutput(logps="mine"))
        assert linear_logprob(tensors["hidden"], tensors["weight"], targets).logps == "mine"
        assert linear_logprob(tensors["hidden"].double(), tensors["weight"].double(), targets).logps is not None
        with pytest.raises(ValueError, match="no kernel named"):
            set_override("nothing", "cpu", "float32", None)
    finally:
        clear_overrides()
    assert linear_logprob(tensors["hidden"], tensors["weight"], targets).logps != "mine"
