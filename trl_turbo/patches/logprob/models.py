"""Hook a model's class before accelerate captures its forward for mixed precision."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.patches.logprob.hook import hook_models
from trl_turbo.patching import Replacement


def probe(module: ModuleType) -> str | None:
    """Why the module does not fit, or `None`."""
    method = getattr(getattr(module, "Accelerator", None), "prepare_model", None)
    if method is None or tuple(inspect.signature(method).parameters)[:2] != ("self", "model"):
        return "accelerate.Accelerator.prepare_model no longer takes (self, model)"
    return None


def build(module: ModuleType) -> Iterator[Replacement]:
    """`Accelerator.prepare_model`; the classes of models follow one by one as they come."""
    yield Replacement(module.Accelerator, "prepare_model", _hooked_first)


def _hooked_first(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        hook_models(model)
        return original(self, model, *args, **kwargs)

    return prepare_model
