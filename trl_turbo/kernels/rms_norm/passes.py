"""The launchers: the passes of `reference`, made by the kernels."""

from __future__ import annotations

import torch

from trl_turbo.kernels.launching import launch
from trl_turbo.kernels.rows import Order, Rows, on, processors
from trl_turbo.kernels.sizes import ceil_div, next_power_of_2

from .kernel import backward_kernel, forward_kernel, plan, reduce_kernel
from .spec import Norm

#: Elements of a program's tile. Where the weight's gradient is summed there are few programs, with more in flight.
TILE, SUM_TILE = 2048, 4096
_SUM_PROGRAMS = 2  # a processor
# Tiles that are on their way while one is summed, in shared memory that every GPU has: two of bf16
_AHEAD, _AHEAD_BYTES = 2, 48 << 10


def forward(x: torch.Tensor, weight: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.forward`."""
    y, _, rstd = _forward(x, None, weight, norm)
    return y, rstd


def add_forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.add_forward`."""
    return _forward(x, residual, weight, norm)


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    order = Order(x)
    rows = order.rows(x)
    added = rows if residual is None else order.rows(residual)
    width = x.shape[-1]
    y = order.empty(x, norm.out_dtype(x, weight))
    total = x if residual is None else order.empty(x, x.dtype)
    rstd = order.empty(x, torch.float32, 1)
    tile = plan(width, TILE)
    with on(x.device):
        launch(
            forward_kernel,
            ceil_div(order.count, tile.rows),
            *rows,
            *added,
            weight.contiguous(),
            y,
            total,
            rstd,
            order.count,
            norm.eps,
            norm.offset,
            ADD=residual is not None,
            IN_FLOAT32=norm.scale_in_float32,
            D=width,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    return y, total, rstd


def backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    norm: Norm,
    *,
    grad_x: torch.Tensor | None = None,
    needs_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `reference.backward`."""
    order = Order(x)
    rows, grads = order.rows(x), order.rows(grad_y)
    others: Rows = rows if grad_x is None else order.rows(grad_x)
    width = x.shape[-1]
    new = order.empty(x, x.dtype)
    tile = plan(width, SUM_TILE if needs_weight else TILE)
    programs = ceil_div(order.count, tile.rows)
    loaded = (x, grad_y) if grad_x is None else (x, grad_y, grad_x)
    tile_bytes = tile.rows * tile.block * sum(y.element_size() for y in loaded)
    partial = new
    if needs_weight:
        programs = min(programs, _SUM_PROGRAMS * processors(x.device))
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    with on(x.device):
        launch(
            backward_kernel,
            programs,
            *grads,
            *rows,
            *others,
            weight.contiguous(),
            order.ordered(rstd).contiguous(),
            new,
            partial,
            order.count,
            norm.offset,
            ADD=grad_x is not None,
            WEIGHT=needs_weight,
            STAGES=1 + min(_AHEAD, _AHEAD_BYTES // tile_bytes),
            IN_FLOAT32=norm.scale_in_float32,
            D=width,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
        if not needs_weight:
            return new, None
        grad_weight = torch.empty_like(weight)
        columns, at_once = 32, min(128, next_power_of_2(programs))
        launch(
            reduce_kernel,
            ceil_div(width, columns),
            partial,
            grad_weight,
            programs,
            D=width,
            ROWS=at_once,
            COLUMNS=columns,
        )
    return new, grad_weight
