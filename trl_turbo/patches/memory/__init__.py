"""Memory of a step: what each phase took beside what was planned, and what to do when it was too much."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from trl_turbo.compat.versions import unmet
from trl_turbo.hookspecs import hookimpl
from trl_turbo.patches.lazy import late_patch
from trl_turbo.patching import Patch

if TYPE_CHECKING:
    from trl_turbo.hookspecs import Env

TRL = "trl>=0.29.1"
WITHOUT_PPO = "trl>=1.13"
#: Name -> module, trainer and the methods that sample.
TRAINERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "grpo": ("trl.trainer.grpo_trainer", "GRPOTrainer", ("_generate",)),
    "rloo": ("trl.trainer.rloo_trainer", "RLOOTrainer", ("_generate",)),
    "dpo": ("trl.trainer.dpo_trainer", "DPOTrainer", ()),
    "online_dpo": (
        "trl.experimental.online_dpo.online_dpo_trainer",
        "OnlineDPOTrainer",
        ("_generate", "_generate_vllm"),
    ),
    "ppo": ("trl.experimental.ppo.ppo_trainer", "PPOTrainer", ()),
}

_patch = functools.partial(late_patch, __name__, "memory", TRL)


@hookimpl
def turbo_patches(env: Env) -> list[Patch]:
    """The patches of this seam."""
    patches = []
    for name, (module, trainer, sampling) in TRAINERS.items():
        if name != "ppo" or unmet((WITHOUT_PPO,), env.versions) is not None:
            part, left = ("ppo", "") if name == "ppo" else ("steps", " and leaves a checkpoint")
            summary = f"{trainer} says what it took, and running out of memory says why{left}"
            patches.append(_patch(name, module, part, summary, trainer, sampling))
    return patches
