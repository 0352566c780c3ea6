"""Inputs of a decode step, and how far from float64 a result may be: each rounding is counted, none is measured."""

from __future__ import annotations

import torch

from trl_turbo.kernels.gated.reference import activate


def make(m, n, k, dtype, device="cpu"):
    """x [M, K], weight [N, K] and bias [N]: outputs are near 1."""
    g = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=g).to(device, dtype)
    weight = (torch.randn(n, k, generator=g) / k**0.5).to(device, dtype)
    return x, weight, torch.randn(n, generator=g).to(device, dtype)


def allowed_sums(x, weight):
    """Of K products that are added in float32, in any order; float32's products are rounded, too."""
    return (x.shape[1] + 16) * 2**-24 * (x.double().abs() @ weight.double().abs().T)


def unit(dtype):
    """Half a unit in the last place, relative; and half of the smallest number's."""
    info = torch.finfo(dtype)
    return info.eps / 2, info.smallest_normal * info.eps / 2


def allowed_linear(x, weight, bias=None):
    """The sums' error, a bias that is added in float32, and one rounding."""
    relative, least = unit(x.dtype)
    result = x.double() @ weight.double().T
    added = 0.0 if bias is None else 2**-24 * (result.abs() + 2 * bias.double().abs())
    result = result if bias is None else result + bias.double()
    sums = allowed_sums(x, weight) + added
    return sums + relative * (result.abs() + sums) + least


def allowed_gated(x, weight, activation):
    """Both halves summed and rounded, then the activation, whose slope is below 1.13 and which is itself computed in
    float32, rounded, and the product rounded.
    """
    relative, least = unit(x.dtype)
    both = x.double() @ weight.double().T
    off = allowed_sums(x, weight)
    off = off + relative * (both.abs() + off) + least
    (gate, up), (gate_off, up_off) = both.chunk(2, -1), off.chunk(2, -1)
    act = activate(gate, activation)
    # Of exp and erf 4 units of float32, at the size of the gate
    act_off = 1.13 * gate_off + 4 * 2**-23 * gate.abs()
    act_off = act_off + relative * (act.abs() + act_off) + least
    h_off = act_off * (up.abs() + up_off) + act.abs() * up_off
    return h_off + relative * ((act * up).abs() + h_off) + least
