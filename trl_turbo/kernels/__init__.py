"""Fused operations, each in its own folder with a plain-torch reference. Importing this package imports no torch.

A plugin's `turbo_kernel` hook may offer its own function for an operation, a device type and a compute dtype; `patch()`
asks the hooks once and fills the table here, so that a training step pays one dictionary look-up and runs no hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OPS: tuple[str, ...] = ("linear_logprob", "attention")

_overrides: dict[tuple[str, str, str], Callable[..., Any]] = {}


def set_override(op: str, device: str, dtype: str, fn: Callable[..., Any] | None) -> None:
    """Let `fn` serve `op` on one device type and compute dtype (`"cuda"`, `"bfloat16"`); `None` takes it out again.

    Raises:
        ValueError: `op` is not in `OPS`.
    """
    if op not in OPS:
        raise ValueError(f"There is no kernel named {op!r}; name one of {', '.join(OPS)}.")
    if fn is None:
        _overrides.pop((op, device, dtype), None)
    else:
        _overrides[op, device, dtype] = fn


def get_override(op: str, device: str, dtype: str) -> Callable[..., Any] | None:
    """The function that a plugin set for this operation, device type and compute dtype, or `None`."""
    return _overrides.get((op, device, dtype))


def clear_overrides() -> None:
    """Forget every override."""
    _overrides.clear()


__all__ = ["OPS", "clear_overrides", "get_override", "set_override"]
