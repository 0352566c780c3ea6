"""One warning of a guard: in the report and in the log, on rank 0, unless its keyword turns it off."""

from __future__ import annotations

from trl_turbo._logs import rank
from trl_turbo.report import note
from trl_turbo.settings import setting


def wanted(guard: str) -> bool:
    """Whether this guard is on."""
    return setting(f"guard_{guard}") == "on"


def warn(guard: str, text: str) -> None:
    """Warn, once in a session, and say how this guard is turned off."""
    if wanted(guard) and rank() == 0:
        note("guards", f"{text}. (guard_{guard}=False turns this off)")
