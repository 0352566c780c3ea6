"""The trace of a loader, on modules that load as vLLM's do. No vLLM is needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trl_turbo.engine.destinations import Shape, trace
from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.engine.names import base_weights
from trl_turbo.engine.storage import adopt, without_storage

ROWS = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}


class Trainer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, n, bias=False) for _, n in ROWS.values())
        self.head = nn.Linear(3, 5, bias=False)


class Engine(nn.Module):
    """Joins q, k and v, and pads the head."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(8, 3, dtype=dtype))
        self.head = nn.Parameter(torch.zeros(8, 3, dtype=dtype))

    def load_weights(self, weights):
        for name, value in weights:
            part = name.removesuffix(".weight")
            if part == "head":
                self.head.data[:5].copy_(value)
                self.head.data[5:].fill_(0)
            else:
                start, rows = ROWS[part]
                self.qkv.data.narrow(0, start, rows).copy_(value)


def shapes(model):
    return {name: Shape(slot.parameter.shape, slot.parameter.dtype) for name, slot in base_weights(model).items()}


def test_joined_and_padded_tensors_become_views():
    trainer = Trainer()
    before = {name: p.detach().clone() for name, p in trainer.named_parameters()}
    parameters = dict(trainer.named_parameters())
    with without_storage():
        engine = Engine()
    destinations = trace(engine, shapes(trainer))
    assert destinations["k.weight"].offset == 12
    adopt(engine, base_weights(trainer), destinations)
    for name, parameter in trainer.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, before[name])
    assert torch.equal(engine.qkv, torch.cat([before[f"{n}.weight"] for n in ROWS]))
    assert torch.equal(engine.head[5:], torch.zeros(3, 3))
    with torch.no_grad():
        trainer.v.weight.add_(1)
    assert torch.equal(engine.qkv[6:], before["v.weight"] + 1)


def test_a_single_tensor_is_adopted_where_it_lies_even_inside_a_larger_one():
    trainer, engine = nn.Linear(3, 8, bias=False), nn.Module()
    flat = torch.arange(40.0)
    trainer.weight.data = flat[10:34].view(8, 3)
    engine.w = nn.Parameter(torch.zeros(8, 3))
    engine.load_weights = lambda weights: [engine.w.data.copy_(value) for _, value in weights]
    adopt(engine, base_weights(trainer), trace(engine, shapes(trainer)))
    assert engine.w.data_ptr() == trainer.weight.data_ptr() == flat[10:].data_ptr()


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (lambda e, n, v: e.qkv.data[:4].copy_(v * 2), "computes 4 of its weights"),
        (lambda e, n, v: e.qkv.data.narrow(0, 0, v.shape[0]).copy_(v.flip(0)), "computes"),
        (lambda e, n, v: e.qkv.data.view(-1)[: v.numel()].view(3, -1).t().copy_(v), "another layout"),
        (lambda e, n, v: e.qkv.data[:1].copy_(v[:1]), "takes 3 of the 12 elements"),
        (lambda e, n, v: e.qkv.data.narrow(0, 0, int(v.sum())), "cannot be followed"),
        (lambda e, n, v: torch.zeros(v.shape).copy_(v), "no parameter"),
    ],
)
def test_what_cannot_be_shared_says_why(load, words):
    engine = Engine()
    engine.load_weights = lambda weights: [load(engine, name, value) for name, value in weights]
    with pytest.raises(EngineDeclinedError, match=words):
        trace(engine, shapes(Trainer()))


def test_another_dtype_says_both():
    with pytest.raises(EngineDeclinedError, match="float32 in training and bfloat16 in vLLM"):
        trace(Engine(torch.bfloat16), shapes(Trainer()))


def test_a_weight_of_vllm_that_nothing_fills_is_declined_before_anything_changes():
    trainer = Trainer()
    with without_storage():
        engine = Engine()
        engine.extra = nn.Parameter(torch.zeros(2, 2))
    destinations = trace(engine, shapes(trainer))
    before = {name: p.data_ptr() for name, p in trainer.named_parameters()}
    with pytest.raises(EngineDeclinedError, match="extra"):
        adopt(engine, base_weights(trainer), destinations)
    assert {name: p.data_ptr() for name, p in trainer.named_parameters()} == before
