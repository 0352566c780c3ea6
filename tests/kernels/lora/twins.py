"""The gated product with its adapters against plain torch, run by `tests/kernels/test_triton.py` on its own."""

from __future__ import annotations

import pytest
import torch

from trl_turbo.kernels.gated import ACTIVATIONS
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.kernels.lora import gated_kernel
from trl_turbo.kernels.lora.reference import ACTIVATIONS as PLAIN

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter computes bf16 wrongly
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
#: Rows, columns, and the ranks of both adapters; 0 is none
SIZES = [(1, 1, 1, 1), (37, 130, 16, 4), (64, 256, 3, 0), (33, 200, 0, 8), (5, 128, 17, 128), (2, 300, 0, 0)]


def make(rows, columns, gate_rank, up_rank, dtype):
    g = torch.Generator().manual_seed(0)

    def tensor(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g)).to(DEVICE, dtype)

    gate, up, grad = (tensor(rows, columns, scale=scale) for scale in (2, 1, 1))
    low = tensor(rows, gate_rank + up_rank)
    made = [tensor(columns, rank) if rank else None for rank in (gate_rank, up_rank)]
    return grad, gate, up, low, made


def plainly(grad, gate, up, low, sides, activation, dtype):
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
    return h.detach(), *torch.autograd.grad(h, leaves, grad.to(dtype))


def check(grad, gate, up, low, sides, activation, *, over=False):
    before = [x.clone() for x in (grad, gate, up, low)]
    truth = plainly(*before, sides, activation, torch.float64)
    stock = plainly(*before, sides, activation, gate.dtype)
    nan = lambda: torch.full_like(gate, torch.nan)  # noqa: E731
    h = gated_kernel.forward(gate, up, low, sides, activation, gate.clone() if over else nan())
    outputs = (grad, gate, up) if over else (nan(), nan(), nan())
    gated_kernel.backward(grad, gate, up, low, sides, activation, outputs)
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
    check(*make(37, 130, 16, 4, dtype), "silu", over=True)


def test_forward_over_gate_and_over_up():
    _, gate, up, low, sides = make(37, 130, 16, 4, torch.float32)
    wanted = gated_kernel.forward(gate, up, low, sides, "silu", torch.empty_like(gate))
    assert torch.equal(gated_kernel.forward(gate.clone(), up, low, sides, "silu", up.clone()), wanted)
    over = gate.clone()
    assert gated_kernel.forward(over, up, low, sides, "silu", over) is over
    assert torch.equal(over, wanted)
