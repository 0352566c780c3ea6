"""PPO, whose loop never enables the gradient checkpointing that its configuration asks for (TRL up to 1.12).

TRL's own wrapper of policy and value model can be enabled, and its generation disables it for as long as it samples;
only nobody calls it. Can go with TRL 1.12, the last that has PPO.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.compat.signatures import misfit
from trl_turbo.patches.checkpointing.models import without_device
from trl_turbo.patching import Replacement
from trl_turbo.report import note


def probe(module: ModuleType) -> str | None:
    """Why the module does not fit, or `None`."""
    owner = getattr(module, "PPOTrainer", None)
    if owner is None:
        return f"{module.__name__} has no PPOTrainer"
    if not hasattr(module, "PolicyAndValueWrapper"):
        return f"{module.__name__} has no PolicyAndValueWrapper"
    return misfit(owner, {"train": ("self",)}) or without_device()


def build(module: ModuleType) -> Iterator[Replacement]:
    """The training loop."""
    yield Replacement(module.PPOTrainer, "train", _enabled_first)


def _enabled_first(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.gradient_checkpointing:
            both = self.accelerator.unwrap_model(self.model)
            settings = {"gradient_checkpointing_kwargs": self.args.gradient_checkpointing_kwargs}
            if not hasattr(both, "gradient_checkpointing_enable"):  # 0.29.1, where generation looks for them alike
                both.gradient_checkpointing_enable = functools.partial(_enable, both)
                both.gradient_checkpointing_disable = functools.partial(_disable, both)
            if _can(both.policy) and not both.is_gradient_checkpointing:
                both.gradient_checkpointing_enable(**settings)
            if _can(both.value_model) and not both.value_model.is_gradient_checkpointing:
                both.value_model.gradient_checkpointing_enable(**settings)
        return original(self, *args, **kwargs)

    return train


def _can(model: Any) -> bool:
    if getattr(model, "supports_gradient_checkpointing", False):
        return True
    note("checkpointing", f"{type(model).__name__} does not support gradient checkpointing and trains without it")
    return False


def _enable(both: Any, **kwargs: Any) -> None:
    both.policy.gradient_checkpointing_enable(**kwargs)
    both.is_gradient_checkpointing = True


def _disable(both: Any) -> None:
    both.policy.gradient_checkpointing_disable()
    both.is_gradient_checkpointing = False
