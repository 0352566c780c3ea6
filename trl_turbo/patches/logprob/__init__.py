"""Per-token log-probabilities and their companions straight from hidden states, in all five trainers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trl_turbo.compat.versions import unmet
from trl_turbo.hookspecs import hookimpl
from trl_turbo.patching import Patch, Replacement

if TYPE_CHECKING:
    from trl_turbo.hookspecs import Env

TRL = "trl>=0.29.1,<1.17"
WITHOUT_PPO = "trl>=1.13"
WITH_FUSED_HEAD = "trl>=1.15"


def _late(part: str, function: str, *args: Any) -> Callable[[ModuleType], Any]:
    """A function of one of this package's modules, imported when called: they import torch."""

    def call(module: ModuleType) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{part}"), function)(module, *args)

    return call


def _either(old: str, trainer: str, *old_args: Any) -> tuple[Callable[..., str | None], Callable[..., Any]]:
    """Probe and build of a trainer whose module either uses TRL's fused head (1.15 and later) or makes logits."""

    def chosen(module: ModuleType, step: str) -> Any:
        if hasattr(module, "add_fused_lm_head"):
            return _late("fused_head", f"trainer_{step}", trainer)(module)
        return _late(old, step, *old_args)(module)

    def build(module: ModuleType) -> Iterable[Replacement]:
        return chosen(module, "build")

    return functools.partial(chosen, step="probe"), build


@hookimpl
def turbo_patches(env: Env) -> list[Patch]:
    """The log-prob patches that this version of TRL has a place for."""
    patches = []
    for name, trainer in (("grpo", "GRPOTrainer"), ("rloo", "RLOOTrainer")):
        probe, build = _either("policy", trainer, trainer)
        patches.append(
            Patch(
                name=f"logprob.{name}",
                feature="logprob",
                module=f"trl.trainer.{name}_trainer",
                requires=(TRL,),
                probe=probe,
                build=build,
                summary=f"{name.upper()} scores policy, old and reference passes without logits",
            )
        )
    probe, build = _either("dpo", "DPOTrainer")
    patches.append(
        Patch(
            name="logprob.dpo",
            feature="logprob",
            module="trl.trainer.dpo_trainer",
            requires=(TRL,),
            probe=probe,
            build=build,
            summary="DPO scores chosen, rejected and reference answers without logits",
        )
    )
    patches.append(
        Patch(
            name="logprob.online_dpo",
            feature="logprob",
            module="trl.experimental.online_dpo.online_dpo_trainer",
            requires=(TRL,),
            probe=_late("online_dpo", "probe"),
            build=_late("online_dpo", "build"),
            summary="OnlineDPO scores policy and reference passes without logits",
        )
    )
    patches.append(
        Patch(
            name="logprob.models",
            feature="logprob",
            module="accelerate.accelerator",
            requires=(TRL,),
            probe=_late("models", "probe"),
            build=_late("models", "build"),
            summary="causal language models score tokens in their own forward",
        )
    )
    # A trainer or a global that this TRL does not have is left out: a row would say nothing, and strict would raise
    if unmet((WITHOUT_PPO,), env.versions) is not None:
        patches.append(
            Patch(
                name="logprob.ppo",
                feature="logprob",
                module="trl.experimental.ppo.ppo_trainer",
                requires=(TRL,),
                probe=_late("ppo", "probe"),
                build=_late("ppo", "build"),
                summary="PPO scores policy and reference passes without logits, and rollouts without a stack of scores",
            )
        )
    if unmet((WITH_FUSED_HEAD,), env.versions) is None:
        patches.append(
            Patch(
                name="logprob.fused_head",
                feature="logprob",
                module="trl.trainer.utils",
                requires=(TRL,),
                probe=_late("fused_head", "probe"),
                build=_late("fused_head", "build"),
                summary="TRL's fused head runs our kernel where that measures faster",
            )
        )
    return patches
