"""The session: patch, unpatch, status."""

from __future__ import annotations

from trl_turbo.report import Report


class PatchError(RuntimeError):
    """A patch did not apply under ``strict=True``."""


def patch(
    *, strict: bool = False, verbose: bool | None = None, logprob: bool | None = None, **features: bool | None
) -> Report:
    """Patch TRL."""
    raise NotImplementedError


patch_trl = patch


def unpatch() -> Report:
    """Take every patch back."""
    raise NotImplementedError


def status() -> Report:
    """Return the current state."""
    return Report()
