"""Give a trainer a callback for as long as it trains.

Around its loop and not in `__init__`: trainers that were made before `patch()` are served too, after `unpatch()` no
callback of ours is left anywhere, and no frame of ours stands between a script and the warnings of TRL's constructors.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.patching import Replacement
from trl_turbo.report import note

#: What else is told of a trainer before its first step, such as the plan that `trl-turbo run --plan` prints.
before_training: list[Callable[[Any], None]] = []

CALLBACKS = {
    "dashboard": ("trl_turbo.dashboard.callback", "Dashboard"),
    "guards": ("trl_turbo.patches.people.guards", "Guards"),
}


def probe(module: ModuleType, owner: str, loop: str, feature: str) -> str | None:  # noqa: ARG001
    """Why the module does not fit, or `None`."""
    if getattr(getattr(module, owner, None), loop, None) is None:
        return f"{module.__name__} has no {owner}.{loop}"
    return None


def build(module: ModuleType, owner: str, loop: str, feature: str) -> Iterator[Replacement]:
    """The replacements."""
    yield Replacement(getattr(module, owner), loop, functools.partial(_attached, feature))


def _attached(feature: str, original: Callable[..., Any]) -> Callable[..., Any]:
    part, name = CALLBACKS[feature]

    @functools.wraps(original)
    def loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind = getattr(importlib.import_module(part), name)
        if not _concerns(self) or any(type(callback) is kind for callback in self.callback_handler.callbacks):
            return original(self, *args, **kwargs)
        try:
            callback = kind(self)
        except Exception as error:
            note(feature, f"there is none for this {type(self).__name__}: {type(error).__name__}: {error}")
            return original(self, *args, **kwargs)
        if not any(type(other).__module__.startswith("trl_turbo.") for other in self.callback_handler.callbacks):
            for tell in before_training:
                tell(self)
        # First, so that what it shows is cleared away before the trainer's own progress bar ends
        self.callback_handler.callbacks.insert(0, callback)
        try:
            return original(self, *args, **kwargs)
        finally:
            callback.finish()
            self.callback_handler.callbacks.remove(callback)

    return loop


def _concerns(trainer: Any) -> bool:
    """Whether it is a trainer of TRL, or made from one, on rank 0."""
    is_trl = any(kind.__module__.partition(".")[0] == "trl" for kind in type(trainer).__mro__)
    return is_trl and trainer.args.process_index == 0
