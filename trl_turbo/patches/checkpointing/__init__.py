"""Gradient checkpointing that keeps layers' inputs in host memory, and MLPs that run a tile of rows at a time."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

from trl_turbo.compat.versions import unmet
from trl_turbo.hookspecs import hookimpl
from trl_turbo.patches.lazy import late_patch
from trl_turbo.patching import Patch

if TYPE_CHECKING:
    from trl_turbo.hookspecs import Env
    from trl_turbo.report import Report

TRANSFORMERS = "transformers>=4.56.2"
TRL = "trl>=0.29.1,<1.13"
WITHOUT_PPO = "trl>=1.13"
PPO = "trl.experimental.ppo.ppo_trainer"

_patch = functools.partial(late_patch, __name__)


@hookimpl
def turbo_patches(env: Env) -> list[Patch]:
    """The patches of this seam."""
    modeling, accelerator = "transformers.modeling_utils", "accelerate.accelerator"
    offload = "with gradient_checkpointing=True, the inputs of layers wait for backward in pinned host memory"
    inside = "marks the layers that are checkpointed, in which an MLP is made again anyway"
    tiles = "gated MLPs of checkpointed layers, and those of passes without gradients, run a tile of rows at a time"
    patches = [
        _patch("checkpointing", TRANSFORMERS, "layers", modeling, "models", offload, "checkpointing"),
        _patch("mlp_tiling", TRANSFORMERS, "layers", modeling, "models", inside, "mlp_tiling"),
        _patch("mlp_tiling", TRANSFORMERS, "models", accelerator, "tiled", tiles),
    ]
    if unmet((WITHOUT_PPO,), env.versions) is not None:
        summary = "PPO enables the gradient checkpointing that its configuration asks for"
        patches.append(_patch("checkpointing", TRL, "ppo", PPO, "ppo", summary))
    return patches


@hookimpl
def turbo_report(report: Report) -> None:
    """Models that were set up while a feature was on go on without it once it is off; pinned memory is given back."""
    models = sys.modules.get(f"{__name__}.models")
    if models is not None:
        on = {row.feature for row in report if row.status == "applied"}
        for feature in ("checkpointing", "mlp_tiling"):
            models.switch(feature, on=feature in on)
