"""A model's norms, rotary embedding and gated MLPs on our ops, adopted by what they compute and not by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_turbo.hookspecs import hookimpl
from trl_turbo.patches.lazy import late
from trl_turbo.patching import Patch

if TYPE_CHECKING:
    from trl_turbo.hookspecs import Env

SUMMARIES = {
    "norms": "RMSNorms that compute what ours does keep their input and one number a row for backward",
    "rope": "the rotary embedding of models whose function computes what ours does is one pass over queries and keys",
    "mlp": "gated MLPs that compute what ours does keep gate and up alone between their linears",
}


@hookimpl
def turbo_patches(env: Env) -> list[Patch]:  # noqa: ARG001
    """One patch a feature: each looks at a model when accelerate prepares it, and extends itself to what fits."""
    return [
        Patch(
            name=f"{feature}.models",
            feature=feature,
            module="accelerate.accelerator",
            probe=late(__name__, "models", "probe"),
            build=late(__name__, "models", "build", feature),
            summary=summary,
        )
        for feature, summary in SUMMARIES.items()
    ]
