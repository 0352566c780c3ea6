"""Linears with adapters, the sums in float64 that they approximate, and PEFT's own layer of the same weights."""

from __future__ import annotations

import torch
from torch import nn

from trl_turbo.kernels.lora import Adapter, Dense, Projection, reference

F64 = torch.float64


def adapters(outputs, inputs, ranks, dtype=F64, *, scaling=1.7, dropout=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = []
    for rank in ranks:
        a = torch.randn(rank, inputs, generator=g, dtype=F64) / inputs**0.5
        b = torch.randn(outputs, rank, generator=g, dtype=F64) / rank**0.5
        made.append(Adapter(a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), scaling, dropout))
    return tuple(made)


def projection(outputs, inputs, ranks=(2,), dtype=F64, *, adapter=None, bias=True, seed=0, **settings):
    """A dense linear, [out, in], whose adapters have a dtype of their own or the base's."""
    g = torch.Generator().manual_seed(100 + seed)
    weight = (torch.randn(outputs, inputs, generator=g, dtype=F64) / inputs**0.5).to(dtype)
    own = (0.3 * torch.randn(outputs, generator=g, dtype=F64)).to(dtype) if bias else None
    made = adapters(outputs, inputs, ranks, adapter or dtype, seed=seed, **settings)
    return Projection(Dense(weight, own, dtype), made, adapter or dtype, dtype)


def parameters(*projections):
    return [tensor for p in projections for adapter in p.adapters for tensor in adapter[:2]]


def plainly(x, p):
    """`lora_linear` in plain torch and the dtypes of x."""
    return reference.linear(x, p.base.weight, p.base.bias, p.adapters)


def exact(p):
    """The same projection in float64, with leaves of its own."""
    bias = None if p.base.bias is None else p.base.bias.double()
    made = tuple(
        a._replace(
            lora_A=a.lora_A.detach().double().requires_grad_(), lora_B=a.lora_B.detach().double().requires_grad_()
        )
        for a in p.adapters
    )
    return Projection(Dense(p.base.weight.double(), bias, F64), made, F64, F64)


def peft_layer(p):
    """PEFT's LoRA layer with the base and the one adapter of a projection."""
    from peft import LoraConfig, get_peft_model

    (adapter,) = p.adapters
    outputs, inputs = p.base.weight.shape
    model = nn.Module()
    model.linear = nn.Linear(inputs, outputs, bias=p.base.bias is not None, dtype=p.base.weight.dtype)
    config = LoraConfig(r=adapter.rank, lora_dropout=adapter.dropout, target_modules=["linear"])
    layer = get_peft_model(model, config).base_model.model.linear
    with torch.no_grad():
        layer.base_layer.weight.copy_(p.base.weight)
        if p.base.bias is not None:
            layer.base_layer.bias.copy_(p.base.bias)
    layer.lora_A["default"].weight = nn.Parameter(adapter.lora_A.detach().clone())
    layer.lora_B["default"].weight = nn.Parameter(adapter.lora_B.detach().clone())
    layer.scaling["default"] = adapter.scaling
    return layer.train()
