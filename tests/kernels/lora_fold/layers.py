"""Linears with adapters, and what folding must make of them, computed another way."""

from __future__ import annotations

import torch

from trl_turbo.kernels.lora_fold import LoraLayer

BITS = {2: torch.int16, 4: torch.int32}


def make(outputs, inputs, rank, dtype, *, adapter=torch.float32, share=0.003, scaling=2.0, seed=0, device="cpu"):
    """A layer whose adapter adds this share of the weight's spread."""
    g = torch.Generator().manual_seed(seed)
    weight = 0.03 * torch.randn(outputs, inputs, generator=g)
    a = torch.randn(rank, inputs, generator=g)
    b = torch.randn(outputs, rank, generator=g) * (share * 0.03 / (abs(scaling) * max(rank, 1) ** 0.5))
    return LoraLayer(weight.to(device, dtype), a.to(device, adapter), b.to(device, adapter), scaling)


def bits(tensor):
    return tensor.view(BITS[tensor.element_size()])


def delta(layer):
    """What the adapter adds, [out, in] float32: a chain of multiply-adds by rank, each rounded once. Triton 3.9's
    interpreter does so too; older ones round the products as well, and differ here in float32.
    """
    a, b = layer.lora_A.float(), layer.lora_B.float() * layer.scaling
    out = torch.zeros(layer.weight.shape, device=a.device)
    for k in range(a.shape[0]):
        # The product of two float32 is exact in float64
        out = (b[:, k, None].double() * a[k].double() + out.double()).float()
    return out


def wanted(layer):
    """The folded weight, and which of its elements do not come back."""
    weight, added = layer.weight, delta(layer)
    folded = (weight.float() + added).to(weight.dtype)
    return folded, bits((folded.float() - added).to(weight.dtype)) != bits(weight)


def bound(layer, folded):
    """How far two orders of float32 sums may take a folded weight apart: twice r + 1 roundings of all products, and
    where that falls beside the middle of two numbers, one unit of the weight's dtype.
    """
    sums = (layer.lora_B.double() * layer.scaling).abs() @ layer.lora_A.double().abs()
    unit = torch.finfo(folded.dtype).eps * folded.double().abs() + torch.finfo(folded.dtype).tiny
    return 2 * (layer.lora_A.shape[0] + 1) * 2**-24 * sums + unit


def entry_bytes(layer):
    """Of the log: a place and the bits."""
    return 4 if layer.weight.element_size() == 2 else 8
