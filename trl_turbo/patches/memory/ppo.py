"""PPO (up to TRL 1.12), whose loop has no step of its own and empties torch's cache many times in an update.

What a part of the loop took is in use until that, so it is asked for right before. The first time after a rollout is
left out: what is in use there is what the rollout left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.compat.signatures import misfit
from trl_turbo.patches.memory import steps
from trl_turbo.patching import Replacement

SIGNATURES = {"batch_generation": ("model", "queries"), "empty_cache": ()}


def probe(module: ModuleType, trainer_name: str, sampling: tuple[str, ...]) -> str | None:
    """Why the module does not fit, or `None`."""
    return steps.probe(module, trainer_name, sampling) or misfit(module, SIGNATURES)


def build(module: ModuleType, trainer_name: str, _: tuple[str, ...]) -> Iterator[Replacement]:
    """The training loop, what samples, and where parts of the loop end."""
    yield Replacement(getattr(module, trainer_name), "train", steps.make_train)
    yield Replacement(module, "batch_generation", _sampled)
    yield Replacement(module, "empty_cache", _emptied)


def _sampled(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def batch_generation(*args: Any, **kwargs: Any) -> Any:
        with steps.rollout(steps.training()):
            return original(*args, **kwargs)

    return batch_generation


def _emptied(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def empty_cache() -> None:
        trainer = steps.training()
        if trainer is not None and not vars(trainer).pop(steps.SAMPLED, False):
            steps.measure(trainer, "training")
        original()

    return empty_cache
