"""Dropout that keeps no mask: the generator's state says what was dropped.

Masks are drawn by torch's own dropout, in the dtype and order in which PEFT's layers draw them: from one seed both drop
the same elements. Dropout is linear, so the same draw applied to a gradient is its backward.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def generator_of(device: torch.device) -> torch.Generator:
    """The generator from which torch's dropout draws on a device."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


def drop(x: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, in] with a share of it dropped, and the state to `replay` it with."""
    state = generator_of(x.device).get_state()
    return functional.dropout(x, share, training=True), state


def replay(x: torch.Tensor, share: float, state: torch.Tensor) -> torch.Tensor:
    """Drop from x [N, in], contiguous and of the dtype of the first time, what was dropped then."""
    generator = generator_of(x.device)
    now = generator.get_state()
    generator.set_state(state)
    try:
        return functional.dropout(x, share, training=True)
    finally:
        generator.set_state(now)
