"""The hooks that a plugin may implement; third parties register through the entry-point group ``trl_turbo``.

A plugin is a module or an object with functions marked by :data:`trl_turbo.hookimpl`::

    import trl_turbo

    @trl_turbo.hookimpl
    def turbo_patches(env):
        return [trl_turbo.patching.Patch(...)]

No hook runs inside a training step: all are called by ``patch()``, ``unpatch()`` or at the end of an import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from trl_turbo.patching import Patch
    from trl_turbo.report import Report

PROJECT = "trl_turbo"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Env:
    """What a plugin may know before anything is imported.

    Attributes:
        versions: Installed version of each distribution of interest, ``None`` where it is not installed.
        python: The version of Python, such as ``"3.11.7"``.
        platform: ``sys.platform``.
        features: Whether each feature known so far is on. The features that plugins bring are complete in
            ``turbo_veto``; in ``turbo_patches`` only the built-in ones and the keywords of ``patch()`` are there.
        words: In which of its ways a feature is on, for those that were given one, such as ``{"rollout": "script"}``.
    """

    versions: Mapping[str, str | None]
    python: str
    platform: str
    features: Mapping[str, bool]
    words: Mapping[str, str] = field(default_factory=dict)


@hookspec
def turbo_patches(env: Env) -> list[Patch] | None:
    """Return the patches that this plugin brings. Called for one plugin at a time, so that one that raises is alone."""


@hookspec(firstresult=True)
def turbo_veto(patch: Patch, env: Env) -> str | None:
    """Return why ``patch`` must not be applied, in words, or ``None``. The first reason makes the row ``skipped``."""


@hookspec(firstresult=True)
def turbo_kernel(op: str, device: str, dtype: str) -> Callable[..., Any] | None:
    """Return a function to use for ``op`` in place of the built-in one, or ``None``.

    Asked at ``patch()`` time for every op in :data:`trl_turbo.kernels.OPS`, on ``"cpu"`` and ``"cuda"``, in
    ``"float32"``, ``"float16"`` and ``"bfloat16"``.
    """


@hookspec(firstresult=True)
def turbo_engine(config: Any) -> object | None:
    """Return a generation engine for ``config``, or ``None`` to leave it to the next plugin."""


@hookspec
def turbo_report(report: Report) -> None:
    """Called with the new report whenever ``patch()``, ``unpatch()`` or an import changed what is patched."""
