"""One forward where a rollout is trained on at once: the pass under the old policy is that of the training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_turbo.hookspecs import hookimpl
from trl_turbo.patches.lazy import late_patch
from trl_turbo.patching import Patch

if TYPE_CHECKING:
    from trl_turbo.hookspecs import Env

TRL = "trl>=0.29.1,<1.17"
TRAINERS = (("grpo", "GRPOTrainer"), ("rloo", "RLOOTrainer"))


@hookimpl
def turbo_patches(env: Env) -> list[Patch]:  # noqa: ARG001
    """The patches of this seam."""
    return [
        late_patch(
            __name__,
            "shared_pass",
            TRL,
            name,
            f"trl.trainer.{name}_trainer",
            "trainer",
            f"{name.upper()} scores a rollout once where its only training step has the same weights",
            trainer,
        )
        for name, trainer in TRAINERS
    ]
