"""The gated MLP under gradient checkpointing: it keeps x alone, and its backward goes over rows tile by tile."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.kernels.lora.linears import F64, exact, parameters, peft_layer, plainly, projection
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.kernels.lora import halves, lora_mlp, mlp, together


@pytest.fixture
def calls(monkeypatch):
    """How often halves were computed, and in which function of autograd."""
    counted = Counter()
    compute = halves.compute
    monkeypatch.setattr(halves, "compute", lambda *a, **k: (counted.update(["halves"]), compute(*a, **k))[1])
    for kind in (mlp.KeepsHalves, mlp.KeepsInput):
        apply = kind.apply
        name = kind.__name__
        monkeypatch.setattr(
            kind, "apply", lambda *a, apply=apply, name=name: (counted.update([name]), apply(*a))[1], raising=False
        )
    return counted


@pytest.fixture
def tiled(monkeypatch):
    monkeypatch.setattr(mlp, "LEAST_ROWS", 128)
    monkeypatch.setattr(mlp, "TILE_BYTES", 1)


def made(dtype=F64, **settings):
    sizes = ((9, 6), (9, 6), (6, 9))
    return [projection(*size, (2,), dtype, seed=i, **settings) for i, size in enumerate(sizes)]


def layer(x, projections, after=lambda y: y):
    """As a decoder layer calls it: a norm before, the residual after."""
    return after(x + lora_mlp(x.sin(), *projections, "silu"))


def gradients(run, x, projections, grad):
    x = x.clone().requires_grad_()
    y = run(x)
    return y.detach(), *torch.autograd.grad(y, (x, *parameters(*projections)), grad)


def test_keeps_its_input_and_is_not_run_again(calls):
    projections = made()
    x, grad = torch.randn(2, 5, 6, dtype=F64), torch.randn(2, 5, 6, dtype=F64)
    plain = gradients(lambda x: layer(x, projections), x, projections, grad)
    assert calls == {"KeepsHalves": 1, "halves": 1}
    calls.clear()
    found = gradients(lambda x: checkpoint(layer, x, projections, use_reentrant=False), x, projections, grad)
    # Forward and backward; the recomputed forward ends where x is packed
    assert calls == {"KeepsInput": 2, "halves": 2}
    assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))


def test_something_kept_after_it_lets_the_recomputed_forward_run(calls):
    projections = made()
    x, grad = torch.randn(5, 6, dtype=F64), torch.randn(5, 6, dtype=F64)
    plain = gradients(lambda x: layer(x, projections, torch.sin), x, projections, grad)
    calls.clear()
    run = lambda x: checkpoint(layer, x, projections, torch.sin, use_reentrant=False)  # noqa: E731
    assert all(torch.equal(*pair) for pair in zip(gradients(run, x, projections, grad), plain, strict=True))
    assert calls == {"KeepsInput": 2, "halves": 3}


def test_reentrant_checkpointing_keeps_the_halves(calls):
    projections = made()
    x, grad = torch.randn(5, 6, dtype=F64), torch.randn(5, 6, dtype=F64)
    plain = gradients(lambda x: layer(x, projections), x, projections, grad)
    calls.clear()
    x = x.clone().requires_grad_()
    y = checkpoint(layer, x, projections, use_reentrant=True)
    y.backward(grad)  # this kind takes no torch.autograd.grad
    found = y.detach(), x.grad, *(t.grad for t in parameters(*projections))
    assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))
    assert calls == {"KeepsHalves": 1, "halves": 2}


@pytest.mark.parametrize("rows", [127, 128, 129, 1000])
def test_tiles_give_what_all_rows_give(rows, tiled, calls):
    projections = made()
    x, grad = torch.randn(rows, 6, dtype=F64), torch.randn(rows, 6, dtype=F64)
    plain = gradients(lambda x: layer(x, projections), x, projections, grad)
    calls.clear()
    run = lambda x: checkpoint(layer, x, projections, use_reentrant=False)  # noqa: E731
    for mine, theirs in zip(gradients(run, x, projections, grad), plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert calls["halves"] == 2 * max(1, -(-rows // 128))
    with torch.no_grad():
        torch.testing.assert_close(layer(x, projections), plain[0])


def test_tiles_are_of_whole_blocks_and_nearly_of_one_size(monkeypatch):
    gate, up, down = made()
    gated = mlp.Gated(together(gate, up), together(down), "silu")
    monkeypatch.setattr(mlp, "TILE_BYTES", 9 * 8 * 5000)
    found = list(mlp.tiles(torch.empty(33_792, 6), gated))
    assert [part.stop - part.start for part in found] == [4864] * 6 + [4608]
    assert [part.start for part in found] == [4864 * i for i in range(7)]
    assert list(mlp.tiles(torch.empty(0, 6), gated)) == [slice(0, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tiles_round_no_worse_than_pefts_layers(dtype, tiled):
    projections = [projection(96, 64, (8,), dtype, seed=0), projection(96, 64, (8,), dtype, seed=1)]
    projections.append(projection(64, 96, (8,), dtype, seed=2))
    layers = [peft_layer(p) for p in projections]
    g = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(700, 64, generator=g).to(dtype) for _ in range(2))
    run = lambda x: checkpoint(lora_mlp, x, *projections, "silu", use_reentrant=False)  # noqa: E731
    found = gradients(run, x, projections, grad)
    x_stock = x.clone().requires_grad_()
    weights = [t for layer in layers for t in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)]
    y = layers[2](nn.functional.silu(layers[0](x_stock)) * layers[1](x_stock))
    stock = y.detach(), *torch.autograd.grad(y, (x_stock, *weights), grad)
    true = [exact(p) for p in projections]
    by_truth = lambda x: plainly(nn.functional.silu(plainly(x, true[0])) * plainly(x, true[1]), true[2])  # noqa: E731
    truth = gradients(by_truth, x.double(), true, grad.double())
    for mine, theirs, want in zip(found, stock, truth, strict=True):
        assert mine.dtype == theirs.dtype
        assert excess_error(mine, theirs, want, 0.1 + 3 / want.numel() ** 0.5) <= 1


def test_dropout_and_another_width_keep_the_halves(calls):
    x = torch.randn(5, 6, dtype=F64, requires_grad=True)
    checkpoint(layer, x, made(dropout=0.5), use_reentrant=False).sum().backward()
    narrow = [*made()[:2], projection(4, 9, (2,))]
    checkpoint(lora_mlp, x, *narrow, "silu", use_reentrant=False).sum().backward()
    assert calls["KeepsInput"] == 0
    assert calls["KeepsHalves"] == 4


def test_frozen_inputs_and_adapters(tiled):
    projections = made()
    for i, tensor in enumerate(parameters(*projections)):
        tensor.requires_grad_(i in (1, 4))
    x = torch.randn(300, 6, dtype=F64)
    wanted = [t for t in parameters(*projections) if t.requires_grad]

    def run(*_):
        return lora_mlp(x, *projections, "silu")

    found = torch.autograd.grad(checkpoint(run, use_reentrant=False).sin().sum(), wanted)
    for mine, plain in zip(found, torch.autograd.grad(run().sin().sum(), wanted), strict=True):
        torch.testing.assert_close(mine, plain)


def test_a_weight_changed_before_backward_raises():
    projections = made()
    x = torch.randn(3, 6, dtype=F64, requires_grad=True)
    y = checkpoint(lora_mlp, x, *projections, "silu", use_reentrant=False).sum()
    with torch.no_grad():
        projections[1].base.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        y.backward()
