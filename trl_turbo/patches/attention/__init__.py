"""Our attention under its own name in transformers, and in place of eager and sdpa in the trainers' scoring passes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from trl_turbo.compat.versions import unmet
from trl_turbo.hookspecs import hookimpl
from trl_turbo.patches.lazy import late_patch
from trl_turbo.patching import Patch

if TYPE_CHECKING:
    from trl_turbo.hookspecs import Env
    from trl_turbo.report import Report

TRL = "trl>=0.29.1,<1.17"
WITH_FUSED_HEAD = "trl>=1.15"
TRANSFORMERS = "transformers>=4.56.2,<6"
FORWARD = "trl_turbo.patches.logprob.forward"
TRAINERS = (("grpo", "GRPOTrainer"), ("rloo", "RLOOTrainer"), ("dpo", "DPOTrainer"))


def fused_patches(package: str, feature: str, env: Env) -> list[Patch]:
    """What a feature patches where TRL scores through a fused head of its own, in front of the model's forward."""
    if unmet((WITH_FUSED_HEAD,), env.versions) is not None:
        return []
    summary = "{}'s passes through TRL's fused head run so too"
    return [
        late_patch(
            package,
            feature,
            WITH_FUSED_HEAD,
            name,
            f"trl.trainer.{name}_trainer",
            "fused",
            summary.format(name.upper()),
            feature,
            trainer,
        )
        for name, trainer in TRAINERS
    ]


@hookimpl
def turbo_patches(env: Env) -> list[Patch]:
    """The patches of this seam."""
    named = "attn_implementation='trl_turbo' selects our attention"
    passes = "scoring passes attend with our kernel, over tokens alone and without a mask of [L, L]"
    return [
        late_patch(__name__, "attention", TRANSFORMERS, "interface", "transformers.modeling_utils", "entry", named),
        late_patch(__name__, "attention", TRL, "passes", FORWARD, "entry", passes, "attention"),
        *fused_patches(__name__, "attention", env),
    ]


@hookimpl
def turbo_report(report: Report) -> None:
    """Take the name out of transformers' tables where nothing uses it any more."""
    interface = sys.modules.get("trl_turbo.patches.attention.interface")
    on = any(row.feature in ("attention", "packing") and row.status == "applied" for row in report)
    if interface is not None and not on:
        interface.unregister()
