"""What people see of a training, and what warns them: the dashboard and the guards, as callbacks of TRL's trainers."""

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
TRAINER = "transformers.trainer"
# Not `train`, which subclasses override, and the feature `memory` replaces
LOOP = ("Trainer", "_inner_training_loop")
PPO = "trl.experimental.ppo.ppo_trainer"
WITHOUT_PPO = "trl>=1.13"

_patch = functools.partial(late_patch, __name__)


@hookimpl
def turbo_patches(env: Env) -> list[Patch]:
    """The patches of this seam."""
    shown = "shows what {} logs while it trains, and writes a log and a report"
    warned = "warns of what makes a training of {} useless"
    every = "every TRL trainer"
    patches = [
        _patch("dashboard", TRL, "trainer", TRAINER, "attach", shown.format(every), *LOOP, "dashboard"),
        _patch("dashboard", TRL, "phases", "trl.extras.profiling", "phases", "peak memory is told by phase of a step"),
        _patch("guards", TRL, "trainer", TRAINER, "attach", warned.format(every), *LOOP, "guards"),
        _patch(
            "guards",
            TRL,
            "chat_template",
            "transformers.tokenization_utils_base",
            "chat_template",
            "says what to do where a tokenizer has no chat template for chats",
        ),
    ]
    for name in ("grpo", "rloo"):
        summary = f"says which sizes {name.upper()} takes where a group does not divide the batch"
        patches.append(
            _patch("guards", TRL, f"{name}_group_size", f"trl.trainer.{name}_config", "group_size", summary, name)
        )
    if unmet((WITHOUT_PPO,), env.versions) is not None:  # it has a loop of its own
        for feature, summary in (("dashboard", shown), ("guards", warned)):
            loop = ("PPOTrainer", "train", feature)
            patches.append(_patch(feature, TRL, "ppo", PPO, "attach", summary.format("PPO"), *loop))
    return patches
