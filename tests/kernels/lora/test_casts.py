"""Adapters that are cast together: the same to the bit as one by one, in one launch, and only where that can be."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.lora.linears import adapters, parameters, projection
from trl_turbo.kernels.lora import Dense, Projection, casts, lora_mlp, lora_qkv, together
from trl_turbo.kernels.lora.casts import casts_of

BF16 = torch.bfloat16
IN, INNER, RANK = 64, 96, 16


def half(outputs, inputs, ranks=(RANK,), seed=0, **settings):
    """A base in bfloat16 whose adapters, in float32, multiply in bfloat16."""
    base = projection(outputs, inputs, (), torch.float32, seed=seed).base
    made = adapters(outputs, inputs, ranks, torch.float32, seed=seed, **settings)
    return Projection(Dense(base.weight.to(BF16), base.bias.to(BF16), BF16), made, BF16, BF16)


def one_by_one(linears):
    a = torch.cat([adapter.lora_A for adapter in linears.adapters]).to(BF16)
    return a, [adapter.lora_B.to(BF16) for adapter in linears.adapters]


class Launches(TorchDispatchMode):
    """Counts what casts or lays side by side."""

    def __init__(self):
        super().__init__()
        self.casts = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in ("aten::_to_copy", "aten::_foreach_copy_", "aten::cat"):
            self.casts.append(name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


FAMILIES = {
    "projections of attention": [[half(64, IN), half(32, IN, seed=1), half(32, IN, seed=2)]],
    "a gated MLP": [[half(INNER, IN), half(INNER, IN, seed=1)], [half(IN, INNER, seed=2)]],
    "several adapters and none": [[half(64, IN, (16, 32)), half(32, IN, (), seed=1), half(32, IN, (16,), seed=2)]],
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_cast_in_one_launch_to_the_same_bits(family):
    linears = [together(*projections) for projections in family]
    with torch.no_grad(), Launches() as launches:
        made = casts_of(*linears)
        found = [(cast.a, cast.b) for cast in reversed(made)][::-1]
    assert launches.casts == ["_foreach_copy_"]
    for each, (a, b) in zip(linears, found, strict=True):
        wanted_a, wanted_b = one_by_one(each)
        assert a.dtype == BF16
        assert torch.equal(a, wanted_a)
        assert len(b) == len(wanted_b)
        assert all(map(torch.equal, b, wanted_b))
        for x in (a, *b):  # as memory of their own would
            assert x.is_contiguous()
            assert x.storage_offset() * x.itemsize % 512 == 0


APART = {
    "of one linear": [[half(64, IN)]],
    "that would not begin where their own memory does": [[half(64, IN, (3,)), half(32, IN, (3,), seed=1)]],
    "of several dtypes": [
        [half(INNER, IN), half(INNER, IN, seed=1)],
        [projection(IN, INNER, (RANK,), BF16, seed=2)],
    ],
    "in it already": [[projection(64, IN, (RANK,), BF16), projection(32, IN, (RANK,), BF16, seed=1)]],
}


@pytest.mark.parametrize("family", APART.values(), ids=APART)
def test_cast_one_by_one(family):
    linears = [together(*projections) for projections in family]
    with torch.no_grad(), Launches() as launches:
        found = [(cast.a, cast.b) for cast in casts_of(*linears)]
    assert "_foreach_copy_" not in launches.casts
    for each, (a, b) in zip(linears, found, strict=True):
        wanted_a, wanted_b = one_by_one(each)
        assert torch.equal(a, wanted_a)
        assert all(map(torch.equal, b, wanted_b))


def passes(trained=True, moved=lambda x: x):
    """Outputs and gradients of the projections of attention and of a gated MLP, `moved` to a device."""
    q, k, v, gate, up, down = [
        moved(p) for name in ("projections of attention", "a gated MLP") for ps in FAMILIES[name] for p in ps
    ]
    x = torch.randn(24, IN, generator=torch.Generator().manual_seed(3))
    x = x.to(q.base.weight.device, BF16).requires_grad_(trained)
    outputs = *lora_qkv(x, q, k, v), lora_mlp(x, gate, up, down, "silu")
    if not trained:
        return outputs
    wanted = x, *parameters(q, k, v, gate, up, down)
    return *outputs, *torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])


def test_passes_compute_the_same_to_the_bit(monkeypatch):
    together_now = passes()
    with torch.no_grad():
        without_gradients = passes(trained=False)
    with torch.inference_mode():
        in_inference = passes(trained=False)
    monkeypatch.setattr(casts, "_FEWEST", 1 << 10)
    assert all(map(torch.equal, together_now, passes()))
    assert all(map(torch.equal, without_gradients, passes(trained=False)))
    assert all(map(torch.equal, in_inference, without_gradients))


def test_frozen_adapters_are_cast_while_gradients_are_on():
    family = [half(64, IN), half(32, IN, seed=1)]
    frozen = [
        Projection(
            p.base,
            tuple(a._replace(lora_A=a.lora_A.detach(), lora_B=a.lora_B.detach()) for a in p.adapters),
            BF16,
            BF16,
        )
        for p in family
    ]
    x = torch.randn(8, IN).to(BF16)
    with torch.no_grad():
        wanted = lora_qkv(x, *family)
    found = lora_qkv(x, *frozen)
    assert not any(y.requires_grad for y in found)
    assert all(map(torch.equal, found, wanted))


def test_each_pass_casts_what_an_optimizer_wrote_without_a_sign_of_it():
    """Those of bitsandbytes, DeepSpeed and FSDP move no version counter."""
    family = [half(64, IN), half(32, IN, seed=1)]
    x = torch.randn(8, IN).to(BF16)
    with torch.no_grad():
        before = lora_qkv(x, *family)
        for weight in parameters(*family):
            version = weight._version
            weight.data.mul_(2)
            assert weight._version == version
        after = lora_qkv(x, *family)
        again = lora_qkv(x, *(Projection(p.base, p.adapters, BF16, BF16) for p in family))
    assert not torch.equal(before[0], after[0])
    assert all(map(torch.equal, after, again))
