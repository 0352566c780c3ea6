"""Per-token log-probabilities and their companions straight from hidden states, in all five trainers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trl_turbo.compat.versions import unmet
from trl_turbo.hookspecs import hookimpl
from trl_turbo.patches.lazy import late, late_patch
from trl_turbo.patching import Patch

if TYPE_CHECKING:
    from trl_turbo.hookspecs import Env

TRL = "trl>=0.29.1,<1.17"
WITHOUT_PPO = "trl>=1.13"
WITH_FUSED_HEAD = "trl>=1.15"
ONLINE_DPO = "trl.experimental.online_dpo.online_dpo_trainer"
PPO = "trl.experimental.ppo.ppo_trainer"


def _trainer(name: str, trainer: str, part: str, summary: str, *args: Any) -> Patch:
    """A trainer whose module either uses TRL's fused head (1.15 and later) or makes logits."""

    def either(step: str) -> Callable[[ModuleType], Any]:
        fused, plain = late(__name__, "fused_head", f"trainer_{step}", trainer), late(__name__, part, step, *args)
        return lambda module: (fused if hasattr(module, "add_fused_lm_head") else plain)(module)

    return Patch(
        name=f"logprob.{name}",
        feature="logprob",
        module=f"trl.trainer.{name}_trainer",
        requires=(TRL,),
        probe=either("probe"),
        build=either("build"),
        summary=summary,
    )


_patch = functools.partial(late_patch, __name__, "logprob", TRL)


@hookimpl
def turbo_patches(env: Env) -> list[Patch]:
    """The log-prob patches that this version of TRL has a place for."""
    passes = "scores policy, old and reference passes without logits"
    patches = [
        _trainer("grpo", "GRPOTrainer", "policy", f"GRPO {passes}", "GRPOTrainer"),
        _trainer("rloo", "RLOOTrainer", "policy", f"RLOO {passes}", "RLOOTrainer"),
        _trainer("dpo", "DPOTrainer", "dpo", "DPO scores chosen, rejected and reference answers without logits"),
        _patch("online_dpo", ONLINE_DPO, "online_dpo", "OnlineDPO scores policy and reference passes without logits"),
        _patch("models", "accelerate.accelerator", "models", "causal language models score in their own forward"),
    ]
    # A trainer or a global that this TRL does not have is left out: a row would say nothing, and strict would raise
    if unmet((WITHOUT_PPO,), env.versions) is not None:
        summary = "PPO scores policy and reference passes without logits, and rollouts without a stack of scores"
        patches.append(_patch("ppo", PPO, "ppo", summary))
    if unmet((WITH_FUSED_HEAD,), env.versions) is None:
        summary = "TRL's fused head runs our kernel where that measures faster, or keeps TRL's from making all logits"
        patches.append(_patch("fused_head", "trl.trainer.utils", "fused_head", summary))
    return patches
