"""PEFT's LoRA layers, the projections of attention and the gated MLP on functions that keep little for backward."""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import TYPE_CHECKING

from trl_turbo.hookspecs import hookimpl
from trl_turbo.patches.lazy import late_patch
from trl_turbo.patching import Patch

if TYPE_CHECKING:
    from trl_turbo.hookspecs import Env
    from trl_turbo.report import Report

PEFT = "peft>=0.17"

_patch = functools.partial(late_patch, __name__, "lora", PEFT)


@hookimpl
def turbo_patches(env: Env) -> list[Patch]:  # noqa: ARG001
    """The patches of this seam."""
    kept = "keep their input once and no dropout mask"
    patches = [
        _patch("linear", "peft.tuners.lora.layer", "layers", f"LoRA linears {kept}", "Linear"),
        _patch(
            "models", "accelerate.accelerator", "models", "LoRA MLPs are one function; so are queries, keys and values"
        ),
    ]
    # Where it is not installed there is nothing to replace: a row would say nothing, and strict would raise
    if importlib.util.find_spec("bitsandbytes") is not None:
        for kind in ("Linear4bit", "Linear8bitLt"):
            summary = f"LoRA over {kind} {kept}, and no dequantised weight"
            patches.append(_patch(kind.lower(), "peft.tuners.lora.bnb", "layers", summary, kind))
    return patches


@hookimpl
def turbo_report(report: Report) -> None:
    """Give the buffer of dequantised weights back where the layers are PEFT's again."""
    scratch = sys.modules.get("trl_turbo.kernels.lora.scratch")
    if scratch is not None and not any(row.feature == "lora" and row.status == "applied" for row in report):
        scratch.release()
