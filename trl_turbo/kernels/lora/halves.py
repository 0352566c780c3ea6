"""Both halves of a gated MLP, gate and up, and the product over them, with the adapters wherever that costs least."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from trl_turbo.kernels.gated import gated_backward, gated_forward
from trl_turbo.kernels.rows import takes

from . import products
from .casts import Cast
from .products import States
from .spec import Linears


class Halves(NamedTuple):
    """What the two linears of one input gave.

    Attributes:
        gate: [N, I].
        up: [N, I].
        low: [N, R], both adapters' narrow side.
        states: Of dropout.
        apart: Whether gate and up are without their adapters, which the product then adds.
    """

    gate: torch.Tensor
    up: torch.Tensor
    low: torch.Tensor
    states: States
    apart: bool


def compute(x: torch.Tensor, linears: Linears, cast: Cast, *, training: bool) -> Halves:
    """Both halves of x [N, in].

    Args:
        x: [N, in], contiguous.
        linears: Gate and up.
        cast: Their adapters.
        training: Whether a backward pass follows.
    """
    outputs = products.bases(x, linears, training=training)
    low, states = products.narrow(x, linears, cast)
    apart = _kernel(outputs, low, linears) is not None
    if not apart:
        outputs = products.add_adapters(outputs, low, linears, cast)
    return Halves(outputs[0], outputs[1], low, states, apart)


def product(halves: Halves, linears: Linears, cast: Cast, activation: str, *, over: bool) -> torch.Tensor:
    """h [N, I] = activation(gate) * up.

    Args:
        halves: From `compute`.
        linears: As there.
        cast: Their adapters.
        activation: As in `trl_turbo.kernels.gated`.
        over: Whether gate may be written over; nobody may need it after.
    """
    gate, up, low, _, apart = halves
    if not apart:
        return gated_forward(gate, up, activation)
    from . import gated_kernel

    out = gate if over else torch.empty_like(gate)
    return gated_kernel.forward(gate, up, low, _sides(linears, cast), activation, out)


def adds_down(halves: Halves, down: Linears, states: States) -> bool:
    """Whether `backward` adds what comes through down's adapter to the gradient of h itself."""
    if not halves.apart or len(down.adapters) != 1 or any(state is not None for state in states):
        return False
    from . import gated_kernel

    fits = down.compute == down.projections[0].base.dtype == halves.gate.dtype
    return fits and down.rank <= gated_kernel.WIDEST_DOWN


def backward(
    grad_h: torch.Tensor,
    halves: Halves,
    linears: Linears,
    cast: Cast,
    activation: str,
    *,
    down: tuple[torch.Tensor, torch.Tensor] | None = None,
    over: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h again, and the gradients of gate and up, [N, I] each.

    Args:
        grad_h: [N, I], which may be written over.
        halves: From `compute`.
        linears: As there.
        cast: Their adapters.
        activation: As there.
        down: Of down's adapter `high` [N, r] and lora_A [r, I], where `adds_down` and grad_h lacks what they give.
        over: Whether gate and up may be written over.
    """
    gate, up, low, _, apart = halves
    if not apart:
        h, of_gate, of_up = gated_backward(grad_h, gate, up, activation, in_place=over)
        assert h is not None
        return h, of_gate, of_up
    from . import gated_kernel

    grad_h = grad_h.contiguous()
    outputs = grad_h, gate if over else torch.empty_like(gate), up if over else torch.empty_like(up)
    gated_kernel.backward(grad_h, gate, up, low, _sides(linears, cast), down, activation, outputs)
    return outputs


def _sides(linears: Linears, cast: Cast) -> list[torch.Tensor | None]:
    """lora_B of gate's adapter and of up's, `None` where there is none."""
    b = iter(cast.b)
    return [next(b) if projection.adapters else None for projection in linears.projections]


def _kernel(outputs: list[torch.Tensor], low: torch.Tensor, linears: Linears) -> ModuleType | None:
    """The kernel that adds the adapters while it multiplies, where it takes them."""
    if not (linears.one_each and takes(*outputs, low)):  # without an adapter there is nothing to add
        return None
    dtype = low.dtype
    for y, projection in zip(outputs, linears.projections, strict=True):
        if y.dtype != dtype or projection.result != dtype or not y.is_contiguous():
            return None
    kernel = _module()
    return kernel if kernel is not None and max(linears.ranks) <= kernel.WIDEST else None


@functools.cache  # an import statement inside a function costs each call of it
def _module() -> ModuleType | None:
    try:
        from . import gated_kernel
    except ImportError:  # torch builds without Triton (Windows)
        return None
    return gated_kernel


__all__ = ["Halves", "adds_down", "backward", "compute", "product"]
