"""What trainers do with a shared engine around a rollout, and the KV cache between rollouts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

from trl_turbo.patching import Replacement

FIRST = ("self", "prompts")


def shared_llm(holder: Any) -> Any:
    """The engine in `holder.llm` where that shares the trainer's weights, else `None`."""
    llm = getattr(holder, "llm", None)
    return llm if getattr(llm, "shared", None) is not None else None


def following_llm(holder: Any) -> Any:
    """The engine in `holder.llm` where it takes the trainer's weights by itself, shared or pushed, else `None`."""
    llm = getattr(holder, "llm", None)
    return llm if getattr(llm, "follows", False) else None


def refresh(holder: Any) -> bool:
    """Make the next rollout use the weights as they are now; return whether the engine could do that by itself."""
    llm = following_llm(holder)
    if llm is None:
        return False
    llm.refresh()
    return True


def ids_only(holder: Any) -> AbstractContextManager[None]:
    """While open, an engine of ours makes no text of what it samples."""
    llm = following_llm(holder)
    return llm.ids_only() if llm is not None else nullcontext()


def probe(module: ModuleType, trainer_name: str) -> str | None:
    """Why the module does not fit, or `None`."""
    method = getattr(getattr(module, trainer_name, None), "_generate", None)
    if method is None:
        return f"{module.__name__} has no {trainer_name}._generate"
    found = tuple(inspect.signature(method).parameters)[: len(FIRST)]
    return None if found == FIRST else f"{trainer_name}._generate takes {found}, not {FIRST}"


def build(module: ModuleType, trainer_name: str) -> Iterator[Replacement]:
    """The replacements."""
    yield Replacement(getattr(module, trainer_name), "_generate", released_after)


def released_after(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give up the KV cache once all turns of a rollout are sampled."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            llm = shared_llm(getattr(self, "vllm_generation", self))
            if llm is not None:
                llm.release()

    return method
