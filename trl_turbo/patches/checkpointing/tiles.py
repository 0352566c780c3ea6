"""A function of rows, such as an MLP's, a tile of rows at a time in forward and backward.

Backward makes each tile again, so that what is between input and output exists for one tile alone. In a layer that is
checkpointed that costs nothing: the layer's own second forward ends at `_Anchor`, which saves the input before the
MLP runs, because torch's checkpoint stops where the last saved tensor is there (`early_stop`, on by default).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from trl_turbo.kernels.autograd import once_differentiable

Function = Callable[[torch.Tensor], torch.Tensor]


def tiled(
    function: Function,
    x: torch.Tensor,  # [..., H]
    parameters: tuple[torch.Tensor, ...],
    rows: int,
) -> torch.Tensor:  # [..., H']
    """`function(x)`, at most `rows` rows at a time. Each row of the result depends on that row of x alone.

    Gradients of parameters are summed over tiles in float32 and rounded once. A second derivative raises.

    Args:
        function: Maps [1, n, H] to [1, n, H'], without random numbers.
        x: [..., H].
        parameters: What `function` uses and may have a gradient.
        rows: Of the largest tile.
    """
    trained = tuple(p for p in parameters if p.requires_grad)
    if not torch.is_grad_enabled() or not (x.requires_grad or trained):
        return _forward(function, x, rows)
    anchored = _Anchor.apply(x) if x.requires_grad else x
    return _Tiles.apply(anchored, anchored.grad_fn, function, rows, *trained)


class _Anchor(torch.autograd.Function):
    """The identity, which keeps its input. Saved here, it is saved before the function runs and not after."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return grad


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # [..., H]
        anchor: Any,
        function: Function,
        rows: int,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.anchor, ctx.function, ctx.rows, ctx.autocast = anchor, function, rows, _Autocast(x.device.type)
        ctx.parameters = parameters  # not saved: torch's checkpoint would run until they are
        if anchor is None:
            ctx.save_for_backward(x)
        return _forward(function, x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # [..., H']
        (x,), parameters = (ctx if ctx.anchor is None else ctx.anchor).saved_tensors, ctx.parameters
        wants_x = ctx.needs_input_grad[0]
        flat, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = torch.empty_like(flat, memory_format=torch.contiguous_format) if wants_x else None
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        for start, end in _spans(len(flat), ctx.rows):
            piece = flat[start:end].detach().unsqueeze(0).requires_grad_(wants_x)
            with torch.enable_grad(), ctx.autocast.again():
                y = ctx.function(piece)
            inputs = [*([piece] if wants_x else []), *parameters]
            found = list(torch.autograd.grad(y, inputs, flat_grad[start:end].unsqueeze(0), allow_unused=True))
            del y
            if grad_x is not None:
                of_piece = found.pop(0)
                grad_x[start:end] = 0.0 if of_piece is None else of_piece[0]
            for i, part in enumerate(found):
                sums[i] = _add(sums[i], part)
        grads = [None if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)]
        return None if grad_x is None else grad_x.view(x.shape), None, None, None, *grads


class _Autocast:
    """Autocast as it is now, to be entered again in backward.

    Without its cache of weights: a weight that was cast where no gradient is kept would be found again where one is.
    """

    def __init__(self, device: str) -> None:
        self._device, self._on = device, torch.is_autocast_enabled(device)
        self._dtype = torch.get_autocast_dtype(device) if self._on else None

    def again(self) -> Any:
        return torch.autocast(self._device, dtype=self._dtype, enabled=self._on, cache_enabled=False)


def _forward(function: Function, x: torch.Tensor, rows: int) -> torch.Tensor:
    flat = x.detach().reshape(-1, x.shape[-1])
    result: torch.Tensor | None = None
    with torch.no_grad(), _Autocast(x.device.type).again():
        for start, end in _spans(len(flat), rows):
            y = function(flat[start:end].unsqueeze(0))
            if result is None:
                result = y.new_empty((len(flat), y.shape[-1]))
            result[start:end] = y[0]
    assert result is not None
    return result.view(*x.shape[:-1], result.shape[-1])


def _add(total: torch.Tensor | None, part: torch.Tensor | None) -> torch.Tensor | None:
    if part is None:
        return total
    if total is None:
        return part.float() if part.dtype in (torch.float16, torch.bfloat16) else part.clone()
    return total.add_(part)


def _spans(count: int, rows: int) -> Iterator[tuple[int, int]]:
    """`range(count)` in pieces of at most `rows`, as alike in size as whole 128s allow: no small last product."""
    pieces = max(1, math.ceil(count / rows))
    size = min(rows, 128 * math.ceil(count / pieces / 128))
    for start in range(0, count, size):
        yield start, min(start + size, count)
