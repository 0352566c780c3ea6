"""Whether functions still take what a patch was written for. Asked of the real signature, never of a version."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def misfit(owner: Any, functions: Mapping[str, tuple[str, ...]]) -> str | None:
    """Say which function of a class or module is missing or takes other parameters first.

    Args:
        owner: The class or module.
        functions: The first parameters of each function, by its name.

    Returns:
        The sentence for the report, or `None` where all fit.
    """
    label = getattr(owner, "__qualname__", None) or owner.__name__
    for name, wanted in functions.items():
        function = getattr(owner, name, None)
        if function is None:
            return f"{label} has no {name}"
        found = tuple(inspect.signature(function).parameters)[: len(wanted)]
        if found != wanted:
            return f"{label}.{name} takes {found}, not {wanted}"
    return None
