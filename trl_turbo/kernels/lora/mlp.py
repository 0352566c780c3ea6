"""The gated MLP as autograd functions: one keeps both halves for backward, the other its input alone.

Where gradient checkpointing runs a layer again for its backward, keeping both halves buys nothing: they are made in the
recomputed forward, used at once and dropped. Keeping x alone and making the halves inside backward, some thousand rows
at a time, costs as many products, and never has [N, I] in memory: on [33,792, 8,960] in bf16 that is 0.6 GB for each of
gate, up, h and their gradients. The recomputed forward ends where x is packed, when nothing later in the layer is kept,
so the down projection is not made a second time at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import halves as both
from . import products
from .spec import Projections, adapters_of, check_unchanged, plainly, rows_of, shaped, versions

#: Bytes that one [rows, I] of a tile may take; three of them are in use at a time. Half of it is 9 % slower on one H200
#: ([33,792, 8,960] in five tiles instead of three): a tile's launches cost the host more than the device needs for it.
TILE_BYTES = 1 << 28
#: Rows of a tile are at least these: fewer would not fill the device.
LEAST_ROWS = 2048


def recomputes() -> bool:
    """Whether torch's gradient checkpointing (the kind without reentrant backward) packs what is saved now."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def forward(x: torch.Tensor, projections: Projections, activation: str, *, training: bool) -> torch.Tensor:
    """The MLP of x [N, in], without autograd and tile by tile: [N, out].

    Args:
        x: [N, in], contiguous.
        projections: gate, up and down.
        activation: As in `trl_turbo.kernels.gated`.
        training: Whether a backward pass follows.
    """
    y: torch.Tensor | None = None
    for rows in tiles(x, projections):
        halves = both.compute(x[rows], projections[:2], training=training)
        h = both.product(halves, projections[:2], activation, over=True)
        del halves
        (part,), _, _ = products.forward(h, projections[2:], training=training)
        if part.shape[0] == x.shape[0]:
            return part
        if y is None:
            y = part.new_empty((x.shape[0], part.shape[1]))
        y[rows] = part
    assert y is not None
    return y


def tiles(x: torch.Tensor, projections: Projections) -> Iterator[slice]:
    """Rows of x [N, in] that are computed together: all of them, unless they are many and each stands by itself."""
    count = step = x.shape[0]
    if count > LEAST_ROWS and by_rows(projections):
        wide = projections[2].base.shape[1] * projections[0].result.itemsize
        parts = -(-count // max(LEAST_ROWS, TILE_BYTES // wide))
        step = -(-count // (128 * parts)) * 128  # of one size, and of whole blocks of a product
    for start in range(0, max(1, count), max(1, step)):
        yield slice(start, min(count, start + step))


def by_rows(projections: Projections) -> bool:
    """Whether each row can be computed by itself: dropout is drawn for all of x at once."""
    return all(p.base.by_rows for p in projections) and not any(a.dropout for a in adapters_of(projections))


class KeepsHalves(torch.autograd.Function):
    """Keeps x, gate and up."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        projections: Projections,
        activation: str,
        *tensors: torch.Tensor,  # noqa: ARG004
    ) -> Any:
        """x [..., in] to [..., out]."""
        with plainly(x.device):
            gate, up, low, states, ctx.apart = halves = both.compute(rows_of(x), projections[:2], training=True)
            h = both.product(halves, projections[:2], activation, over=False)
            (y,), low_down, states_down = products.forward(h, projections[2:], training=True)
        ctx.save_for_backward(x, gate, up, low, low_down)
        ctx.states = states, states_down
        ctx.projections, ctx.versions, ctx.activation = projections, versions(projections), activation
        return shaped(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Gradients of x and of each adapter."""
        x, gate, up, low, low_down = ctx.saved_tensors
        check_unchanged(ctx)
        states, states_down = ctx.states
        halves = both.Halves(gate, up, low, states, ctx.apart)
        with plainly(x.device):
            of_x, rest = _gradients(
                rows_of(x), rows_of(grad), halves, low_down, states_down, ctx, ctx.needs_input_grad, over=False
            )
            rest = products.in_dtypes(rest, ctx.projections)
        return (None if of_x is None else of_x.view(x.shape)), None, None, *rest


class KeepsInput(torch.autograd.Function):
    """Keeps x, gives it on to `Computes`, and takes from there the gradient of the MLP's output.

    Two functions, because x must be packed before anything is computed for a recomputed forward to end there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        projections: Projections,
        activation: str,
        *tensors: torch.Tensor,  # noqa: ARG004
    ) -> Any:
        """x [..., in], for `Computes` and nobody else."""
        ctx.save_for_backward(x)
        ctx.projections, ctx.versions, ctx.activation = projections, versions(projections), activation
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Gradients of x and of each adapter, from that of the output: the halves are made again, tile by tile."""
        (x,) = ctx.saved_tensors
        check_unchanged(ctx)
        projections, needs = ctx.projections, ctx.needs_input_grad
        rows, grad = rows_of(x), rows_of(grad.to(projections[2].result))
        of_x = torch.empty_like(rows) if needs[0] else None
        rest: list[torch.Tensor | None] = []
        with plainly(x.device):
            for part in tiles(rows, projections):
                halves = both.compute(rows[part], projections[:2], training=True)
                found, more = _gradients(rows[part], grad[part], halves, None, (), ctx, needs, over=True)
                del halves
                if of_x is not None and found is not None:
                    of_x[part] = found
                rest = more if not rest else [_plus(one, other) for one, other in zip(rest, more, strict=True)]
            rest = products.in_dtypes(rest, projections)
        return (None if of_x is None else of_x.view(x.shape)), None, None, *rest


class Computes(torch.autograd.Function):
    """The MLP of what `KeepsInput` gave; its gradient goes back as it came."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, projections: Projections, activation: str) -> torch.Tensor:  # noqa: ARG004
        """x [..., in] to [..., in]: input and output are of one shape."""
        with plainly(x.device):
            return shaped(forward(rows_of(x), projections, activation, training=True), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # noqa: ARG004
        """The gradient of the output, in place of the input's."""
        return grad, None, None


def keeps_input(x: torch.Tensor, projections: Projections) -> bool:
    """Whether `KeepsInput` serves: under gradient checkpointing, an MLP that makes of x what is laid out like x."""
    if not recomputes() or not by_rows(projections):
        return False
    return projections[2].base.shape[0] == x.shape[-1] and projections[2].result == x.dtype


def _gradients(
    x: torch.Tensor,
    grad: torch.Tensor,
    halves: both.Halves,
    low_down: torch.Tensor | None,
    states_down: products.States,
    ctx: Any,
    needs: tuple[bool, ...],
    *,
    over: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of x [N, in] and of all adapters, from grad [N, out]."""
    first, down = ctx.projections[:2], ctx.projections[2:]
    of_halves = 2 * len(adapters_of(first))
    wanted, wanted_down = needs[3 : 3 + of_halves], needs[3 + of_halves :]
    states_down = states_down or (None,) * len(adapters_of(down))
    of_h, high_down = products.input_gradient(halves.gate.dtype, down, [grad], states_down, wanted=True)
    assert of_h is not None
    h, of_gate, of_up = both.backward(of_h, halves, first, ctx.activation, over=over)
    del of_h
    if low_down is None:
        low_down, _ = products.narrow(h, down)
    rest_down = products.adapter_gradients(h, down, [grad], low_down, high_down, states_down, wanted_down)
    del h
    grads = [of_gate, of_up]
    of_x, high = products.input_gradient(x.dtype, first, grads, halves.states, wanted=needs[0])
    rest = products.adapter_gradients(x, first, grads, halves.low, high, halves.states, wanted)
    return of_x, [*rest, *rest_down]


def _plus(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    # Parts in 16 bits are summed in 32
    return one.float().add_(other) if one.dtype.itemsize == 2 else one.add_(other)
