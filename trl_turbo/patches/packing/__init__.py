"""Scoring passes without padding and with each shared prompt once: the batch as one packed row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_turbo.hookspecs import hookimpl
from trl_turbo.patches import attention
from trl_turbo.patches.lazy import late_patch
from trl_turbo.patching import Patch

if TYPE_CHECKING:
    from trl_turbo.hookspecs import Env


@hookimpl
def turbo_patches(env: Env) -> list[Patch]:
    """The patches of this seam."""
    passes = "scoring passes run on one packed row: no padding, and each prompt that answers share once"
    chunks = "{} scores old and reference log-probs in chunks of as many tokens as TRL's, not of as many rows"
    return [
        *(
            late_patch(
                __name__,
                "packing",
                attention.TRL,
                f"{name}_chunks",
                f"trl.trainer.{name}_trainer",
                "chunks",
                chunks.format(name.upper()),
                trainer,
            )
            for name, trainer in attention.TRAINERS
            if name != "dpo"
        ),
        late_patch(
            attention.__name__, "packing", attention.TRL, "passes", attention.FORWARD, "entry", passes, "packing"
        ),
        *attention.fused_patches(attention.__name__, "packing", env),
    ]
