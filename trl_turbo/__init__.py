"""Faster, leaner TRL training from one line: ``import trl_turbo; trl_turbo.patch()``.

Importing this package imports neither torch nor trl, so that the line can stand anywhere in a script.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_turbo.api import PatchError, patch, patch_trl, status, unpatch

if TYPE_CHECKING:
    from trl_turbo.hookspecs import hookimpl as hookimpl

__version__ = "0.1.0"

__all__ = ["PatchError", "__version__", "hookimpl", "patch", "patch_trl", "status", "unpatch"]


def __getattr__(name: str) -> Any:
    # pluggy is imported by the first plugin that asks for the marker, not by every script that imports the package.
    if name == "hookimpl":
        from trl_turbo.hookspecs import hookimpl

        return hookimpl
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
