"""The gated MLP as autograd functions: one keeps both halves for backward, the other its input alone.

Where gradient checkpointing runs a layer again for its backward, keeping both halves buys nothing: they are made in the
recomputed forward, used at once and dropped. Keeping x alone and making the halves inside backward, some thousand rows
at a time, costs as many products, and never has [N, I] in memory: on [33,792, 8,960] in bf16 that is 0.6 GB for each of
gate, up, h and their gradients. The recomputed forward ends where x is packed, when nothing later in the layer is kept,
so the down projection is not made a second time at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from trl_turbo.kernels.autograd import once_differentiable

from . import halves as both
from . import products
from .casts import Cast, casts_of
from .spec import Linears, check_unchanged, plainly, rows_of, shaped, to

#: Bytes that one [rows, I] of a tile may take; three of them are in use at a time. Half of it is 9 % slower on one H200
#: ([33,792, 8,960] in five tiles instead of three): a tile's launches cost the host more than the device needs for it.
TILE_BYTES = 1 << 28
#: Rows of a tile are at least these: fewer would not fill the device.
LEAST_ROWS = 2048


class Gated(NamedTuple):
    """A gated MLP.

    Attributes:
        first: Gate and up.
        down: The one over their product.
        activation: As in `trl_turbo.kernels.gated`.
    """

    first: Linears
    down: Linears
    activation: str


def recomputes() -> bool:
    """Whether torch's gradient checkpointing (the kind without reentrant backward) packs what is saved now."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def forward(x: torch.Tensor, gated: Gated, *, training: bool) -> torch.Tensor:
    """The MLP of x [N, in], without autograd and tile by tile: [N, out].

    Args:
        x: [N, in], contiguous.
        gated: The MLP.
        training: Whether a backward pass follows.
    """
    y: torch.Tensor | None = None
    cast, cast_down = casts_of(gated.first, gated.down)
    for rows in tiles(x, gated):
        halves = both.compute(x[rows], gated.first, cast, training=training)
        h = both.product(halves, gated.first, cast, gated.activation, over=True)
        del halves
        (part,), _, _ = products.forward(h, gated.down, cast_down, training=training)
        if part.shape[0] == x.shape[0]:
            return part
        if y is None:
            y = part.new_empty((x.shape[0], part.shape[1]))
        y[rows] = part
    assert y is not None
    return y


def tiles(x: torch.Tensor, gated: Gated) -> Iterator[slice]:
    """Rows of x [N, in] that are computed together: all of them, unless they are many and each stands by itself."""
    count = step = x.shape[0]
    if count > LEAST_ROWS and by_rows(gated):
        wide = gated.down.projections[0].base.shape[1] * gated.first.projections[0].result.itemsize
        parts = -(-count // max(LEAST_ROWS, TILE_BYTES // wide))
        step = -(-count // (128 * parts)) * 128  # of one size, and of whole blocks of a product
    for start in range(0, max(1, count), max(1, step)):
        yield slice(start, min(count, start + step))


def by_rows(gated: Gated) -> bool:
    """Whether each row can be computed by itself: dropout is drawn for all of x at once."""
    if gated.first.drops or gated.down.drops:
        return False
    return all(p.base.by_rows for linears in (gated.first, gated.down) for p in linears.projections)


class KeepsHalves(torch.autograd.Function):
    """Keeps x, gate and up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gated: Gated, *parameters: torch.Tensor) -> Any:  # noqa: ARG004
        """x [..., in] to [..., out]."""
        with plainly(x.device):
            cast, cast_down = casts_of(gated.first, gated.down)
            gate, up, low, states, ctx.apart = halves = both.compute(rows_of(x), gated.first, cast, training=True)
            h = both.product(halves, gated.first, cast, gated.activation, over=False)
            (y,), low_down, states_down = products.forward(h, gated.down, cast_down, training=True)
        ctx.save_for_backward(x, gate, up, low, low_down)
        ctx.states = states, states_down
        ctx.gated, ctx.versions = gated, _versions(gated)
        return shaped(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Gradients of x and of each adapter."""
        x, gate, up, low, low_down = ctx.saved_tensors
        _check_unchanged(ctx)
        states, states_down = ctx.states
        halves = both.Halves(gate, up, low, states, ctx.apart)
        with plainly(x.device):
            casts = casts_of(ctx.gated.first, ctx.gated.down)
            of_x, rest = _gradients(rows_of(x), rows_of(grad), halves, low_down, states_down, ctx, casts, over=False)
            rest = products.in_dtypes(rest, _parameters(ctx.gated))
        return (None if of_x is None else of_x.view(x.shape)), None, *rest


class KeepsInput(torch.autograd.Function):
    """Keeps x, gives it on to `Computes`, and takes from there the gradient of the MLP's output.

    Two functions, because x must be packed before anything is computed for a recomputed forward to end there.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gated: Gated, *parameters: torch.Tensor) -> Any:  # noqa: ARG004
        """x [..., in], for `Computes` and nobody else."""
        ctx.save_for_backward(x)
        ctx.gated, ctx.versions = gated, _versions(gated)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Gradients of x and of each adapter, from that of the output: the halves are made again, tile by tile."""
        (x,) = ctx.saved_tensors
        _check_unchanged(ctx)
        gated = ctx.gated
        rows, grad = rows_of(x), rows_of(to(grad, gated.down.projections[0].result))
        of_x: torch.Tensor | None = None
        rest: list[torch.Tensor | None] = []
        with plainly(x.device):
            casts = casts_of(gated.first, gated.down)
            for part in tiles(rows, gated):
                halves = both.compute(rows[part], gated.first, casts[0], training=True)
                parts = part.stop - part.start < rows.shape[0]
                found, more = _gradients(rows[part], grad[part], halves, None, (), ctx, casts, over=True, parts=parts)
                del halves
                if found is not None and found.shape[0] == rows.shape[0]:
                    of_x = found
                elif found is not None:
                    of_x = torch.empty_like(rows) if of_x is None else of_x
                    of_x[part] = found
                rest = more if not rest else [_plus(one, other) for one, other in zip(rest, more, strict=True)]
            rest = products.in_dtypes(rest, _parameters(gated))
        return (None if of_x is None else of_x.view(x.shape)), None, *rest


class Computes(torch.autograd.Function):
    """The MLP of what `KeepsInput` gave; its gradient goes back as it came."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gated: Gated) -> torch.Tensor:  # noqa: ARG004
        """x [..., in] to [..., in]: input and output are of one shape."""
        with plainly(x.device):
            return shaped(forward(rows_of(x), gated, training=True), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # noqa: ARG004
        """The gradient of the output, in place of the input's."""
        return grad, None


def keeps_input(x: torch.Tensor, gated: Gated) -> bool:
    """Whether `KeepsInput` serves: under gradient checkpointing, an MLP that makes of x what is laid out like x."""
    if not recomputes() or not by_rows(gated):
        return False
    (down,) = gated.down.projections
    return down.base.shape[0] == x.shape[-1] and down.result == x.dtype


def _versions(gated: Gated) -> tuple[list[int], list[int]]:
    return gated.first.versions(), gated.down.versions()


def _check_unchanged(ctx: Any) -> None:
    for linears, then in zip((ctx.gated.first, ctx.gated.down), ctx.versions, strict=True):
        check_unchanged(linears, then)


def _parameters(gated: Gated) -> tuple[torch.Tensor, ...]:
    return (*gated.first.parameters, *gated.down.parameters)


def _gradients(
    x: torch.Tensor,
    grad: torch.Tensor,
    halves: both.Halves,
    low_down: torch.Tensor | None,
    states_down: products.States,
    ctx: Any,
    casts: list[Cast],
    *,
    over: bool,
    parts: bool = False,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of x [N, in] and of all adapters, from grad [N, out]."""
    needs, (first, down, activation), (cast, cast_down) = ctx.needs_input_grad, ctx.gated, casts
    of_halves = len(first.parameters)
    wanted, wanted_down = needs[2 : 2 + of_halves], needs[2 + of_halves :]
    states_down = states_down or (None,) * len(down.adapters)
    through: tuple[torch.Tensor, torch.Tensor] | None = None
    if both.adds_down(halves, down, states_down):
        of_h: torch.Tensor | None = down.projections[0].base.add_gradient(grad, None)  # the largest first: see `bases`
        _, high_down = products.input_gradient(halves.gate.dtype, down, [grad], states_down, cast_down, wanted=False)
        through = high_down, cast_down.a
    else:
        of_h, high_down = products.input_gradient(halves.gate.dtype, down, [grad], states_down, cast_down, wanted=True)
    assert of_h is not None
    h, of_gate, of_up = both.backward(of_h, halves, first, cast, activation, down=through, over=over)
    del of_h
    if low_down is None:
        low_down, _ = products.narrow(h, down, cast_down)
    rest_down = products.adapter_gradients(h, down, [grad], low_down, high_down, states_down, wanted_down, parts=parts)
    del h
    grads = [of_gate, of_up]
    of_x, high = products.input_gradient(x.dtype, first, grads, halves.states, cast, wanted=needs[0])
    rest = products.adapter_gradients(x, first, grads, halves.low, high, halves.states, wanted, parts=parts)
    return of_x, [*rest, *rest_down]


def _plus(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    # Parts in 16 bits are summed in 32
    return one.float().add_(other) if one.dtype.itemsize == 2 else one.add_(other)
