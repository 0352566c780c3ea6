"""TRL says by its profiling contexts what a trainer is doing; the memory samplers listen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.dashboard.memory import phase_of, running
from trl_turbo.patching import Replacement


def probe(module: ModuleType) -> str | None:
    """Why the module does not fit, or `None`."""
    context = getattr(module, "ProfilingContext", None)
    if context is None or not {"__enter__", "__exit__"} <= vars(context).keys():
        return f"{module.__name__} has no ProfilingContext with an __enter__ and an __exit__"
    if "name" not in context.__init__.__code__.co_varnames:
        return "ProfilingContext has no name any more"
    return None


def build(module: ModuleType) -> Iterator[Replacement]:
    """The replacements."""
    yield Replacement(module.ProfilingContext, "__enter__", _entered)
    yield Replacement(module.ProfilingContext, "__exit__", _left)


def _entered(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def enter(self: Any) -> Any:
        phase = phase_of(self.name)
        if phase is not None:
            for sampler in running:
                sampler.enter(phase)
        return original(self)

    return enter


def _left(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def leave(self: Any, *args: Any) -> Any:
        if phase_of(self.name) is not None:
            for sampler in running:
                sampler.leave()
        return original(self, *args)

    return leave
