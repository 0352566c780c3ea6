"""What the autograd functions have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import function

Backward = Callable[..., Any]


def once_differentiable(backward: Backward) -> Backward:
    """torch's decorator of that name, a second derivative raises, at no cost where no graph of the backward is made.

    Args:
        backward: Of a `torch.autograd.Function`.
    """
    careful = function.once_differentiable(backward)

    @functools.wraps(backward)
    def chosen(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return careful(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return chosen
