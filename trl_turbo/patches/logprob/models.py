"""Hook a model's class before accelerate captures its forward for mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from trl_turbo.patches import preparing
from trl_turbo.patches.logprob.hook import hook_models
from trl_turbo.patches.preparing import probe as probe
from trl_turbo.patching import Replacement


def build(module: ModuleType) -> Iterator[Replacement]:
    """The ways in which `Accelerator` prepares a model; the classes of models follow one by one as they come."""
    yield from preparing.before(module, lambda _, model: hook_models(model))
