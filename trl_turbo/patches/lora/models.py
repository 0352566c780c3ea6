"""Find the attention modules and gated MLPs of a model with adapters, before accelerate prepares it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from trl_turbo.patches.logprob.models import probe as probe
from trl_turbo.patches.lora import group, mlp
from trl_turbo.patching import Replacement, extend
from trl_turbo.report import note

PATCH = "lora.models"


def build(module: ModuleType) -> Iterator[Replacement]:
    """`Accelerator.prepare_model`; the classes inside the models follow as they come."""
    yield Replacement(module.Accelerator, "prepare_model", _hooked_first)


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
    extend(PATCH, Replacement(type(module), "forward", make_forward))


def _hooked_first(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        hook_model(model)
        return original(self, model, *args, **kwargs)

    return prepare_model
