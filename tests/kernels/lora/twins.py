"""The gated product with its adapters against plain torch, run by `tests/kernels/test_triton.py` on its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.kernels.lora.linears import exact, parameters
from tests.kernels.lora.linears import plainly as torch_linear
from tests.kernels.lora.linears import projection as linear
from trl_turbo.kernels.gated import ACTIVATIONS
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.kernels.lora import gated_kernel, halves, lora_mlp
from trl_turbo.kernels.lora.reference import ACTIVATIONS as PLAIN

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter computes bf16 wrongly
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
#: Rows, columns, and the ranks of gate's, up's and down's adapters; 0 is none
SIZES = [
    (1, 1, 1, 1, 1),
    (37, 130, 16, 4, 16),
    (64, 256, 3, 0, 0),
    (33, 200, 0, 8, 3),
    (5, 128, 17, 128, 64),
    (2, 300, 0, 0, 0),
]


def make(rows, columns, gate_rank, up_rank, down_rank, dtype):
    g = torch.Generator().manual_seed(0)

    def tensor(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g)).to(DEVICE, dtype)

    gate, up, grad = (tensor(rows, columns, scale=scale) for scale in (2, 1, 1))
    low = tensor(rows, gate_rank + up_rank)
    made = [tensor(columns, rank) if rank else None for rank in (gate_rank, up_rank)]
    down = (tensor(rows, down_rank), tensor(down_rank, columns)) if down_rank else None
    return grad, gate, up, low, made, down


def plainly(grad, gate, up, low, sides, down, activation, dtype):
    """As PEFT would: each adapter's part is rounded, and so is the sum."""
    start, parts = 0, []
    for side in sides:
        part = 0.0
        if side is not None:
            part = low[:, start : start + side.shape[1]].to(dtype) @ side.to(dtype).t()
            start += side.shape[1]
        parts.append(part)
    leaves = [(x.to(dtype) + part).requires_grad_() for x, part in zip((gate, up), parts, strict=True)]
    h = PLAIN[activation](leaves[0]) * leaves[1]
    grad = grad.to(dtype)
    if down is not None:
        grad = grad + down[0].to(dtype) @ down[1].to(dtype)
    return h.detach(), *torch.autograd.grad(h, leaves, grad)


def check(grad, gate, up, low, sides, down, activation, *, over=False):
    before = [x.clone() for x in (grad, gate, up, low)]
    truth = plainly(*before, sides, down, activation, torch.float64)
    stock = plainly(*before, sides, down, activation, gate.dtype)
    nan = lambda: torch.full_like(gate, torch.nan)  # noqa: E731
    h = gated_kernel.forward(gate, up, low, sides, activation, gate.clone() if over else nan())
    outputs = (grad, gate, up) if over else (nan(), nan(), nan())
    gated_kernel.backward(grad, gate, up, low, sides, down, activation, outputs)
    for mine, theirs, right in zip((h, *outputs), (stock[0], *stock), (truth[0], *truth), strict=True):
        assert mine.dtype == before[1].dtype
        assert excess_error(mine, theirs, right, 1.0 if right.numel() < 2000 else 0.1) <= 1
    if not over:
        assert all(torch.equal(*pair) for pair in zip(before, (grad, gate, up, low), strict=True))


@each_activation
@each_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_as_plain_torch(sizes, dtype, activation):
    check(*make(*sizes, dtype), activation)


@each_dtype
def test_written_over_what_is_read(dtype):
    check(*make(37, 130, 16, 4, 16, dtype), "silu", over=True)


def test_forward_over_gate_and_over_up():
    _, gate, up, low, sides, _ = make(37, 130, 16, 4, 0, torch.float32)
    wanted = gated_kernel.forward(gate, up, low, sides, "silu", torch.empty_like(gate))
    assert torch.equal(gated_kernel.forward(gate.clone(), up, low, sides, "silu", up.clone()), wanted)
    over = gate.clone()
    assert gated_kernel.forward(over, up, low, sides, "silu", over) is over
    assert torch.equal(over, wanted)


@pytest.mark.skipif(CUDA, reason="there test_gpu.py goes through it")
@pytest.mark.parametrize("down_ranks", [(4,), (), (2, 3), (gated_kernel.WIDEST_DOWN + 1,)], ids=str)
def test_the_gated_mlp_through_it(monkeypatch, down_ranks):
    """With down's adapter in the kernel where it is one and narrow, and beside it elsewhere."""
    made = [linear(40, 24, (3,), torch.float32), linear(40, 24, (5,), torch.float32, seed=1)]
    made.append(linear(24, 40, down_ranks, torch.float32, seed=2))
    x, grad = torch.randn(6, 24, requires_grad=True), torch.randn(6, 24)

    def mlp(x, gate, up, down):
        return torch_linear(PLAIN["silu"](torch_linear(x, gate)) * torch_linear(x, up), down)

    def gradients(run, x, made):
        y = run(x, *made)
        return y.detach(), *torch.autograd.grad(y, (x, *parameters(*made)), grad.to(y.dtype))

    stock = gradients(mlp, x, made)
    truth = gradients(mlp, x.detach().double().requires_grad_(), [exact(p) for p in made])
    launched, backward = [], gated_kernel.backward
    monkeypatch.setattr(halves, "takes", lambda *_: True)
    monkeypatch.setattr(gated_kernel, "backward", lambda *given: launched.append(given[5]) or backward(*given))
    found = gradients(partial(lora_mlp, activation="silu"), x, made)
    assert [down is not None for down in launched] == [down_ranks == (4,)]
    for mine, theirs, right in zip(found, stock, truth, strict=True):
        assert excess_error(mine, theirs, right, 1.0) <= 1
