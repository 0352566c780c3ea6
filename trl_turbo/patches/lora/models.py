"""Find the attention modules and gated MLPs of a model with adapters, before accelerate prepares it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from trl_turbo.compat.sharded import own_class
from trl_turbo.patches import preparing
from trl_turbo.patches.lora import group, mlp
from trl_turbo.patches.preparing import probe as probe
from trl_turbo.patching import Replacement, extend
from trl_turbo.report import note

PATCH = "lora.models"


def build(module: ModuleType) -> Iterator[Replacement]:
    """The ways in which `Accelerator` prepares a model; the classes inside the models follow as they come."""
    yield from preparing.before(module, lambda _, model: hook_model(model))


def hook_model(model: Any) -> None:
    """Give the attention and MLP classes of a model with adapters a forward that computes their linears together."""
    if not isinstance(model, nn.Module):
        return
    for module in model.modules():
        if len(group.members_of(module)) > 1 and group.has_one_input(module):
            _hook(module, group.make_forward, "the projections of")
        elif mlp.linears_of(module):
            _hook(module, mlp.make_forward, "the linears of")


def _hook(module: nn.Module, make_forward: Callable[..., Any], what: str) -> None:
    if "forward" in vars(module):  # Liger's, the hub's kernels, or a model spread over devices
        note("lora", f"{what} {type(module).__name__}, which has a forward of its own, run one by one")
        return
    extend(PATCH, Replacement(own_class(module), "forward", make_forward))
