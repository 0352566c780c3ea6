"""`head_logprob` against `linear_logprob` and the reference, through heads that are not a plain matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trl_turbo.kernels.linear_logprob import OUTPUTS, head_logprob, linear_logprob
from trl_turbo.kernels.linear_logprob.reference import excess_error, reference_stats

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
    ),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
N, V, H = 53, 301, 16
# Room for a few rows at a time: 301 float32 logits and three things of that size
BUDGET = 5 * V * 4 * 4


def make(device, dtype=torch.float32):
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=True).to(device, dtype)
    hidden = torch.randn(N, H, device=device, dtype=dtype)
    targets = torch.randint(0, V, (N,), device=device)
    grads = torch.randn(2, N, device=device) / N
    return head, hidden, targets, grads


@on_each_device
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("transform", [{}, {"temperature": 0.8, "softcap": 5.0, "logit_scale": 1.5}], ids=str)
@pytest.mark.parametrize("byte_budget", [BUDGET, None])
def test_equals_linear_logprob(device, entropy_grad, transform, byte_budget):
    head, hidden, targets, grads = make(device)
    results = []
    for fn in ("head", "linear"):
        leaf = hidden.clone().requires_grad_()
        head.zero_grad()
        kw = {"outputs": OUTPUTS, "entropy_grad": entropy_grad, **transform}
        if fn == "head":
            out = head_logprob(head, leaf, targets, byte_budget=byte_budget, **kw)
        else:
            out = linear_logprob(leaf, head.weight, targets, bias=head.bias, **kw)
        total = (out.logps * grads[0]).sum()
        if entropy_grad:
            total = total + (out.entropy * grads[1]).sum()
        total.backward()
        results.append([*(x.detach() for x in out), leaf.grad, head.weight.grad.clone(), head.bias.grad.clone()])
    assert torch.equal(results[0][5], results[1][5])
    for i, (found, wanted) in enumerate(zip(*results, strict=True)):
        if i != 5:
            assert excess_error(found, wanted, wanted) <= 1


class Counting(nn.Module):
    """A head that only a call can compute: two matrices, dropout, and a count of the logits it made at once."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.down, self.up = nn.Linear(H, 8, bias=False), nn.Linear(8, V)
        self.dropout = nn.Dropout(dropout)
        self.out_features = V
        self.most_rows = self.calls = 0

    def forward(self, hidden):
        self.most_rows = max(self.most_rows, len(hidden))
        self.calls += 1
        return self.up(self.dropout(self.down(hidden)))


def test_any_module_in_few_rows():
    _, hidden, targets, _ = make("cpu")
    head = Counting()
    leaf = hidden.clone().requires_grad_()
    out = head_logprob(head, leaf, targets, outputs=OUTPUTS, byte_budget=BUDGET)
    assert head.most_rows <= 5
    calls = head.calls
    out.logps.sum().backward()
    assert head.calls == 2 * calls  # each piece once more, in the backward
    found = leaf.grad, head.down.weight.grad.clone()
    head.zero_grad()
    leaf.grad = None
    wanted = reference_stats(head(leaf), targets)
    wanted.logps.sum().backward()
    for x, y in zip(out[:5], wanted[:5], strict=True):
        assert excess_error(x, y, y) <= 1
    assert torch.equal(out.top1, wanted.top1)
    for x, y in zip(found, (leaf.grad, head.down.weight.grad), strict=True):
        assert excess_error(x, y, y) <= 1


def test_dropout_repeats_in_the_backward():
    _, hidden, targets, _ = make("cpu")
    head = Counting(dropout=0.5)
    masks = []
    head.dropout.register_forward_hook(lambda module, args, out: masks.append(out == 0))
    leaf = hidden.clone().requires_grad_()
    head_logprob(head, leaf, targets, byte_budget=BUDGET).logps.sum().backward()
    half = len(masks) // 2
    again = sorted(masks[half:], key=lambda m: [torch.equal(m, x) for x in masks[:half]].index(True))
    assert all(torch.equal(x, y) for x, y in zip(masks[:half], again, strict=True))


def test_frozen_head_and_no_gradient():
    head, hidden, targets, _ = make("cpu")
    head.requires_grad_(False)
    assert not head_logprob(head, hidden, targets, byte_budget=BUDGET).logps.requires_grad
    leaf = hidden.clone().requires_grad_()
    with torch.no_grad():
        assert not head_logprob(head, leaf, targets).logps.requires_grad
    head_logprob(head, leaf, targets, byte_budget=BUDGET).logps.sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_second_backward():
    head, hidden, targets, _ = make("cpu")
    leaf = hidden.clone().requires_grad_()
    out = head_logprob(head, leaf, targets)  # one piece: its logits stay, unchanged
    first = torch.autograd.grad(out.logps.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.logps.sum(), leaf)[0])


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    head, hidden, targets, _ = make("cpu")
    out = head_logprob(head, hidden[:n], targets[:n], outputs=OUTPUTS)
    assert all(x.shape == (n,) for x in out)


def test_autocast():
    head, hidden, targets, _ = make("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head_logprob(head, hidden, targets, byte_budget=BUDGET)
        wanted = linear_logprob(hidden, head.weight, targets, bias=head.bias)
    plain = reference_stats(head.bfloat16()(hidden.bfloat16()).float(), targets)
    assert out.logps.dtype == torch.float32
    assert excess_error(out.logps, plain.logps, plain.logps) <= 1
    assert (out.logps - wanted.logps).abs().max() < 0.05


def test_bad_input_says_why():
    head, hidden, targets, _ = make("cpu")
    with pytest.raises(ValueError, match="flatten"):
        head_logprob(head, hidden[None], targets)
    with pytest.raises(ValueError, match="one token for each row"):
        head_logprob(head, hidden, targets[1:])
    with pytest.raises(ValueError, match="A target is 301"):
        head_logprob(head, hidden, targets + V - targets)
    with pytest.raises(ValueError, match=r"returned \[53, 2, 301\]"):
        head_logprob(lambda x: head(x)[:, None].expand(-1, 2, -1), hidden, targets)
    with pytest.raises(ValueError, match="temperature"):
        head_logprob(head, hidden, targets, temperature=-1)
