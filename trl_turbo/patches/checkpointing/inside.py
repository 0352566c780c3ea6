"""Whether the code that runs now is a layer that is checkpointed, in forward or when it is made again for backward."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_local = threading.local()  # backward runs in a thread of its own on CUDA


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a layer, which is checkpointed."""
    before = checkpointed()
    _local.inside = True
    try:
        return function(*args, **kwargs)
    finally:
        _local.inside = before


def checkpointed() -> bool:
    """Whether a checkpointed layer runs in this thread."""
    return getattr(_local, "inside", False)
