"""Folding an adapter into the base and out of it leaves every bit of the base as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trl_turbo.engine.merged import Fold, LogTooLargeError
from trl_turbo.kernels.lora_fold import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def layer(outputs, inputs, rank, dtype, *, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(inputs, outputs, bias=False).to(dtype)
    base.weight.data = (0.03 * torch.randn(outputs, inputs, generator=generator)).to(dtype)
    a, b = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
    a.weight.data = torch.randn(rank, inputs, generator=generator) / inputs**0.5
    b.weight.data = scale * torch.randn(outputs, rank, generator=generator)
    return SimpleNamespace(
        get_base_layer=lambda: base, lora_A={"default": a}, lora_B={"default": b}, scaling={"default": 2.0}
    )


def bits(layers):
    return [each.get_base_layer().weight.data.view(torch.uint8).clone() for each in layers.values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_folds_change_no_bit(dtype):
    layers = {"q": layer(48, 64, 8, dtype, scale=0.002), "up": layer(96, 64, 4, dtype, scale=0.002, seed=1)}
    weight = layers["q"].get_base_layer().weight.data
    weight[0, :8] = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 6e-5, 3e4, -3e4, 1.0]).to(dtype)
    before = bits(layers)
    fold = Fold.of_peft(layers, "default")
    for step in range(1000):
        for each in layers.values():  # a training step in between
            each.lora_B["default"].weight.data += 2e-5 * torch.randn(each.lora_B["default"].weight.shape)
            each.scaling["default"] = 1.0 + (step % 3)
        fold.fold()
        fold.restore()
        if step % 100 == 0:
            assert same(bits(layers), before), step
    assert same(bits(layers), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folded_weights_are_the_rounded_sum(dtype):
    layers = {"q": layer(48, 64, 8, dtype, scale=0.002)}
    each = layers["q"]
    base = each.get_base_layer().weight
    expected = (base.float() + 2.0 * each.lora_B["default"].weight @ each.lora_A["default"].weight).to(dtype)
    pointer = base.data_ptr()
    fold = Fold.of_peft(layers, "default")
    fold.fold()
    assert fold.folded
    assert base.data_ptr() == pointer
    torch.testing.assert_close(base, expected)
    fold.restore()
    assert not fold.folded


def test_control_without_the_log_bits_are_lost():
    layers = {"q": layer(48, 64, 8, torch.bfloat16, scale=0.002)}
    before = bits(layers)
    fold = Fold.of_peft(layers, "default")
    fold.fold()
    for pieces in fold._folded.pieces:
        for piece in pieces:
            assert len(piece.index)
            piece.index, piece.bits = piece.index[:0], piece.bits[:0]
    with pytest.raises(RuntimeError, match="could not be restored"):
        fold.restore()
    assert not same(bits(layers), before)


def test_pieces_of_any_size_and_ragged_rows(monkeypatch):
    monkeypatch.setattr(reference, "PIECE", 7 * 64)
    layers = {"q": layer(50, 64, 8, torch.bfloat16, scale=0.002), "one": layer(1, 64, 8, torch.float16, scale=0.002)}
    before = bits(layers)
    fold = Fold.of_peft(layers, "default")
    fold.fold()
    assert not same(bits(layers), before)
    fold.restore()
    assert same(bits(layers), before)


def test_a_log_that_grows_too_large_leaves_the_base_as_it_was():
    layers = {"q": layer(48, 64, 8, torch.bfloat16, scale=50.0)}
    before = bits(layers)
    fold = Fold.of_peft(layers, "default")
    with pytest.raises(LogTooLargeError, match=r"takes \d+% of the folded weights' memory"):
        fold.fold()
    assert not fold.folded
    assert same(bits(layers), before)


def test_an_error_halfway_leaves_the_base_as_it_was(monkeypatch):
    monkeypatch.setattr(reference, "PIECE", 7 * 64)
    layers = {"q": layer(50, 64, 8, torch.bfloat16, scale=0.002), "up": layer(50, 64, 8, torch.bfloat16, scale=0.002)}
    before = bits(layers)
    honest, calls = reference._fold, []

    def out_of_memory(rows, delta):
        calls.append(rows)
        if len(calls) == 11:
            raise MemoryError
        return honest(rows, delta)

    monkeypatch.setattr(reference, "_fold", out_of_memory)
    fold = Fold.of_peft(layers, "default")
    with pytest.raises(MemoryError):
        fold.fold()
    assert not fold.folded
    assert same(bits(layers), before)


def test_a_second_fold_and_a_change_in_between_are_refused():
    layers = {"q": layer(48, 64, 8, torch.bfloat16, scale=0.002)}
    fold = Fold.of_peft(layers, "default")
    fold.fold()
    with pytest.raises(RuntimeError, match="already"):
        fold.fold()
    layers["q"].lora_B["default"].weight.data.add_(0.1)
    with pytest.raises(RuntimeError, match="changed during a rollout"):
        fold.restore()


def test_what_a_script_put_in_place_of_a_parameter_is_folded():
    layers = {"q": layer(48, 64, 8, torch.bfloat16, scale=0.002), "up": layer(96, 64, 4, torch.bfloat16, scale=0.002)}
    fold = Fold.of_peft(layers, "default")
    fold.fold()
    fold.restore()
    q = layers["q"]
    base, b = q.get_base_layer().weight, q.lora_B["default"]
    base.data = 0.5 * base.data
    b.weight = nn.Parameter(2.0 * b.weight.data)
    q.scaling["default"] = 3.0
    before = bits(layers)
    expected = (base.float() + 3.0 * b.weight @ q.lora_A["default"].weight).to(torch.bfloat16)
    fold.fold()
    torch.testing.assert_close(base.data, expected)
    b.weight = nn.Parameter(torch.zeros_like(b.weight))  # what was folded is taken out, not what stands there now
    q.scaling["default"] = 1.0
    fold.restore()
    assert same(bits(layers), before)


def test_a_graph_that_saved_the_weights_can_still_go_backward():
    layers = {"q": layer(48, 64, 8, torch.bfloat16, scale=0.002)}
    inputs = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    loss = layers["q"].get_base_layer()(inputs).sum()
    fold = Fold.of_peft(layers, "default")
    fold.fold()
    fold.restore()
    loss.backward()
    assert inputs.grad is not None


def test_other_dtypes_are_refused():
    each = layer(8, 8, 2, torch.float32)
    each.get_base_layer().weight.data = each.get_base_layer().weight.data.double()
    with pytest.raises(TypeError, match="float64"):
        Fold.of_peft({"q": each}, "default")
