"""The launchers: the passes of `reference`, made by the kernels."""

from __future__ import annotations

import torch

from trl_turbo.kernels.launching import launch
from trl_turbo.kernels.rows import Order, Rows, on
from trl_turbo.kernels.sizes import ceil_div

from . import reference
from .kernel import backward_kernel, forward_kernel

#: Elements of a program, and its warps: 16 elements a thread, two loads of 16 bytes of each tensor in bf16.
BLOCK, WARPS = 2048, 4


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `reference.forward`; gate and up are of one dtype."""
    order = Order(gate)
    h = order.empty(gate, gate.dtype)
    programs, columns, rows = _rows(order, gate, up, h)
    with on(gate.device):
        launch(forward_kernel, programs, *_flat(rows), columns, ACTIVATION=activation, BLOCK=BLOCK, num_warps=WARPS)
    return h


def backward(
    grad_h: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    *,
    with_h: bool = True,
    in_place: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """See `op.gated_backward`; gate and up are of one dtype."""
    order = Order(gate)
    if in_place and (order.view(gate) is None or order.view(up) is None):
        # Where the kernel would have to copy them first it cannot write over them
        return reference.backward(grad_h, gate, up, activation, with_h=with_h, in_place=True)
    grad_gate = gate if in_place else order.empty(gate, gate.dtype)
    grad_up = up if in_place else order.empty(gate, gate.dtype)
    h = order.empty(gate, gate.dtype) if with_h else None
    programs, columns, rows = _rows(order, grad_h, gate, up, grad_gate if h is None else h, grad_gate, grad_up)
    with on(gate.device):
        launch(
            backward_kernel,
            programs,
            *_flat(rows),
            columns,
            ACTIVATION=activation,
            WITH_H=with_h,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    if in_place:
        # Autograd does not see what a kernel writes: whoever saved gate or up for another backward must get an error
        for x in (gate, up):
            torch.autograd.graph.increment_version(x)
    return h, grad_gate, grad_up


def _rows(order: Order, *tensors: torch.Tensor) -> tuple[int, int, list[Rows]]:
    """Programs, columns of a row, and the tensors as rows: as one long row where none of them has gaps."""
    rows = [order.rows(x) for x in tensors]
    count, columns = order.count, tensors[0].shape[-1]
    if all(x.dense for x in rows):
        rows = [Rows(x.tensor, 1, 0, 0) for x in rows]
        count, columns = 1, count * columns
    return count * ceil_div(columns, BLOCK), columns, rows


def _flat(rows: list[Rows]) -> list[object]:
    return [x for one in rows for x in one]
