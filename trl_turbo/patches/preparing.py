"""Where accelerate prepares a model: alone or for DDP and FSDP1, for DeepSpeed, and for FSDP2."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from trl_turbo.patching import Replacement

# The last two get a model together with its optimizer, and do not call the first
METHODS = ("prepare_model", "_prepare_deepspeed", "_prepare_fsdp2")


def probe(module: ModuleType) -> str | None:
    """Why `accelerate.accelerator` does not fit, or `None`."""
    method = getattr(getattr(module, "Accelerator", None), METHODS[0], None)
    if method is None or tuple(inspect.signature(method).parameters)[:2] != ("self", "model"):
        return "accelerate.Accelerator.prepare_model no longer takes (self, model)"
    return None


def before(module: ModuleType, look: Callable[[Any, nn.Module], None]) -> Iterator[Replacement]:
    """Replacements in `accelerate.accelerator` by which `look(accelerator, model)` sees each model before."""
    for method in METHODS:
        if hasattr(module.Accelerator, method):
            yield Replacement(module.Accelerator, method, functools.partial(_looked_at_first, look))


def _looked_at_first(look: Callable[[Any, nn.Module], None], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        for model in (*args, *kwargs.values()):
            if isinstance(model, nn.Module):
                look(self, model)
        return original(self, *args, **kwargs)

    return prepare
