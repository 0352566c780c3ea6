"""Resuming after a rank died: a checkpoint is whole or not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_turbo.hookspecs import hookimpl
from trl_turbo.patches.lazy import late_patch
from trl_turbo.patching import Patch

if TYPE_CHECKING:
    from trl_turbo.hookspecs import Env

TRL = "trl>=0.29.1"


@hookimpl
def turbo_patches(env: Env) -> list[Patch]:  # noqa: ARG001
    """The patches of this seam."""
    summary = "resume_from_checkpoint=True goes on from the last checkpoint that every rank had written to its end"
    return [late_patch(__name__, "resume", TRL, "trainer", "transformers.trainer", "checkpoints", summary)]
