"""The gated product over halves that lack their adapters: each adapter's part is made where it is needed, in registers.

Added with a product of its own, an adapter of rank 16 reads and writes all of [N, I]: 0.49 ms beside the 1.19 ms of the
frozen linear itself, on one H200 with [33,792, 8,960] in bf16. Here it costs no traffic but its few columns. The same
goes for what down's adapter adds to the gradient of the product.
"""

# mypy: disable-error-code="no-untyped-def"
# A kernel's arguments are pointers and numbers that only Triton types

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from trl_turbo.kernels.gated.kernel import activate
from trl_turbo.kernels.launching import launch
from trl_turbo.kernels.rows import on
from trl_turbo.kernels.sizes import ceil_div, next_power_of_2

#: lora_B [I, r] in the dtype of `low`, of gate's adapter and of up's; `None` where there is none.
Sides = Sequence[torch.Tensor | None]
#: Of down's adapter `high` [N, r], its scaling in it, and lora_A [r, I] in that dtype; `None` where there is none.
Down = tuple[torch.Tensor, torch.Tensor] | None

#: Rows and columns of a tile, tiles that a program goes down, and its warps: 16 elements of each half a thread. Of nine
#: such shapes the fastest on one H200: 3.3 TB/s both ways with [11,264, 8,960] in bf16, where a copy has 4.1.
ROWS, COLUMNS, STEPS, WARPS = 32, 64, 2, 4
#: Beyond this rank an adapter's part no longer fits beside the tile in registers.
WIDEST = 128
#: The same of down's adapter, the third beside a tile: with 64 columns ptxas (sm_90) gives a thread 103 registers and a
#: program 50 KiB of shared memory, four programs a multiprocessor; with 128 two are left.
WIDEST_DOWN = 64
# What a matrix unit takes
_NARROWEST = 16


@triton.jit
def _columns_of_b(b_ptr, column, has_column, RANK: tl.constexpr, R: tl.constexpr):
    """B.T [R, N] of an adapter at these columns; zeros where there is none."""
    k = tl.arange(0, R)
    at = column[None, :] * RANK + k[:, None]
    return tl.load(b_ptr + at, mask=has_column[None, :] & (k < RANK)[:, None], other=0.0)


@triton.jit
def _adapted(base, low_ptr, low_stride, b, row, has_row, RANK: tl.constexpr, R: tl.constexpr):
    """base [M, N] plus low @ B.T, in float32."""
    if RANK == 0:
        return base
    k = tl.arange(0, R)
    at = row[:, None] * low_stride + k[None, :]
    low = tl.load(low_ptr + at, mask=has_row[:, None] & (k < RANK)[None, :], other=0.0)
    return base + tl.dot(low, b, input_precision="ieee")


@triton.jit(do_not_specialize=["n_rows"])
def forward_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    low_ptr,
    low_stride,
    gate_b_ptr,
    up_b_ptr,
    n_rows,
    n_columns,
    ACTIVATION: tl.constexpr,
    GATE_RANK: tl.constexpr,
    GATE_R: tl.constexpr,
    UP_RANK: tl.constexpr,
    UP_R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """h = act(gate + its adapter) * (up + its adapter), which may be written over either."""
    across = tl.cdiv(n_columns, COLUMNS)
    first = (tl.program_id(0) // across).to(tl.int64) * (ROWS * STEPS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    has_column = column < n_columns
    gate_b = _columns_of_b(gate_b_ptr, column, has_column, GATE_RANK, GATE_R)
    up_b = _columns_of_b(up_b_ptr, column, has_column, UP_RANK, UP_R)
    for step in tl.range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        has_row = row < n_rows
        at = row[:, None] * n_columns + column[None, :]
        inside = has_row[:, None] & has_column[None, :]
        raw = tl.load(gate_ptr + at, mask=inside, other=0.0)
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gate = raw.to(tl.float32)
        gate = _adapted(gate, low_ptr, low_stride, gate_b, row, has_row, GATE_RANK, GATE_R)
        up = _adapted(up, low_ptr + GATE_RANK, low_stride, up_b, row, has_row, UP_RANK, UP_R)
        act, _ = activate(gate, ACTIVATION)
        tl.store(h_ptr + at, (act * up).to(raw.dtype), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    h_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    low_ptr,
    low_stride,
    gate_b_ptr,
    up_b_ptr,
    high_ptr,
    high_stride,
    down_a_ptr,
    n_rows,
    n_columns,
    ACTIVATION: tl.constexpr,
    GATE_RANK: tl.constexpr,
    GATE_R: tl.constexpr,
    UP_RANK: tl.constexpr,
    UP_R: tl.constexpr,
    DOWN_RANK: tl.constexpr,
    DOWN_R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """h again, which may be written over its gradient, and the gradients of gate and up, which may be over those.

    h's gradient lacks the part of down's adapter.
    """
    across = tl.cdiv(n_columns, COLUMNS)
    first = (tl.program_id(0) // across).to(tl.int64) * (ROWS * STEPS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    has_column = column < n_columns
    gate_b = _columns_of_b(gate_b_ptr, column, has_column, GATE_RANK, GATE_R)
    up_b = _columns_of_b(up_b_ptr, column, has_column, UP_RANK, UP_R)
    k = tl.arange(0, DOWN_R)
    of_a = has_column[None, :] & (k < DOWN_RANK)[:, None]
    down_a = tl.load(down_a_ptr + k[:, None] * n_columns + column[None, :], mask=of_a, other=0.0)
    for step in tl.range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        has_row = row < n_rows
        at = row[:, None] * n_columns + column[None, :]
        inside = has_row[:, None] & has_column[None, :]
        raw = tl.load(gate_ptr + at, mask=inside, other=0.0)
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = _adapted(grad, high_ptr, high_stride, down_a, row, has_row, DOWN_RANK, DOWN_R)
        gate = raw.to(tl.float32)
        gate = _adapted(gate, low_ptr, low_stride, gate_b, row, has_row, GATE_RANK, GATE_R)
        up = _adapted(up, low_ptr + GATE_RANK, low_stride, up_b, row, has_row, UP_RANK, UP_R)
        act, slope = activate(gate, ACTIVATION)
        tl.store(h_ptr + at, (act * up).to(raw.dtype), mask=inside)
        tl.store(grad_gate_ptr + at, (grad * up * slope).to(raw.dtype), mask=inside)
        tl.store(grad_up_ptr + at, (grad * act).to(raw.dtype), mask=inside)


def forward(
    gate: torch.Tensor,  # [N, I]
    up: torch.Tensor,  # [N, I]
    low: torch.Tensor,  # [N, R]
    sides: Sides,
    activation: str,
    h: torch.Tensor,  # [N, I]
) -> torch.Tensor:
    """h, written; `low` has the columns of gate's adapter, times its scaling, and then those of up's."""
    _launch(forward_kernel, (gate, up, h), low, sides, (), activation)
    return h


def backward(
    grad: torch.Tensor,  # [N, I]
    gate: torch.Tensor,  # [N, I]
    up: torch.Tensor,  # [N, I]
    low: torch.Tensor,  # [N, R]
    sides: Sides,
    down: Down,
    activation: str,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],  # h, of gate, of up: [N, I] each
) -> None:
    """Writes the outputs; `grad` is that of h but for what comes through down's adapter."""
    high, a = (low, None) if down is None else down
    rank = 0 if a is None else a.shape[0]
    # As in `_launch`: nothing is read where there is no adapter
    of_down = high, high.stride(0), low if a is None else a.contiguous()
    _launch(backward_kernel, (grad, gate, up, *outputs), low, sides, of_down, activation, rank)


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[torch.Tensor, ...],
    low: torch.Tensor,
    sides: Sides,
    further: tuple[torch.Tensor | int, ...],
    activation: str,
    *further_ranks: int,
) -> None:
    rows, columns = tensors[0].shape
    ranks = tuple([0 if side is None else side.shape[1] for side in sides])
    # Where there is no adapter nothing is read
    b = [low if side is None else side.contiguous() for side in sides]
    with on(low.device):
        launch(
            kernel,
            ceil_div(rows, ROWS * STEPS) * ceil_div(columns, COLUMNS),
            *tensors,
            low,
            low.stride(0),
            *b,
            *further,
            rows,
            columns,
            **_constants(activation, *ranks, *further_ranks),
        )


@functools.cache  # of the few forms of a model: found once, they cost a look-up in each launch
def _constants(activation: str, *ranks: int) -> dict[str, Any]:
    made: dict[str, Any] = {"ACTIVATION": activation}
    for name, rank in zip(("GATE", "UP", "DOWN"), ranks, strict=False):
        made |= {f"{name}_RANK": rank, f"{name}_R": max(_NARROWEST, next_power_of_2(rank))}
    return made | {"ROWS": ROWS, "COLUMNS": COLUMNS, "STEPS": STEPS, "num_warps": WARPS}
