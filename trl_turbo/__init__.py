"""Faster, leaner TRL training from one line: ``import trl_turbo; trl_turbo.patch()``.

Importing this package imports neither torch nor trl, so that the line can stand anywhere in a script.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl_turbo.api import patch, patch_trl, status, unpatch

if TYPE_CHECKING:
    from trl_turbo._session import PatchError as PatchError
    from trl_turbo.dashboard.samples import samples as samples
    from trl_turbo.hookspecs import hookimpl as hookimpl
    from trl_turbo.loading import from_pretrained as from_pretrained
    from trl_turbo.memory_plan import plan as plan
    from trl_turbo.saving import load_lora as load_lora
    from trl_turbo.saving import save_lora as save_lora
    from trl_turbo.saving import save_pretrained_merged as save_pretrained_merged

__version__ = "0.1.0"

__all__ = [
    "PatchError",
    "__version__",
    "from_pretrained",
    "hookimpl",
    "load_lora",
    "patch",
    "patch_trl",
    "plan",
    "samples",
    "save_lora",
    "save_pretrained_merged",
    "status",
    "unpatch",
]

# Imported when first asked for: pluggy, the session and the loader are not for every script that imports the package.
_LATE = {
    "PatchError": "trl_turbo._session",
    "from_pretrained": "trl_turbo.loading",
    "hookimpl": "trl_turbo.hookspecs",
    "load_lora": "trl_turbo.saving",
    "samples": "trl_turbo.dashboard.samples",
    "save_lora": "trl_turbo.saving",
    "save_pretrained_merged": "trl_turbo.saving",
    "plan": "trl_turbo.memory_plan",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
