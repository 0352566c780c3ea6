"""What a trainer tells the engine that is about to be built for it; imports neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from trl_turbo.engine.sizing import Work


@dataclass(frozen=True)
class Trainee:
    """The model that an engine serves.

    Attributes:
        model: The trainer's model, unwrapped by accelerate, with its adapter.
        accelerator: The trainer's, or `None`.
        work: Its rollouts.
        max_lora_rank: Rank to make room for, where an adapter may come later; 0 where none will.
        empty: Whether its parameters have no values yet, and are pointed at those that vLLM loads.
    """

    model: Any
    accelerator: Any
    work: Work
    max_lora_rank: int = 0
    empty: bool = False


_waiting: ContextVar[Callable[[], Trainee] | None] = ContextVar("trl_turbo_trainee", default=None)


@contextmanager
def serving(find: Callable[[], Trainee]) -> Iterator[None]:
    """While open, the first `TurboLLM` that is built serves a trainee; further ones are plain `vllm.LLM`.

    Args:
        find: Returns it when that engine is built: a trainer's model may not be there when its `__init__` is entered.
    """
    token = _waiting.set(find)
    try:
        yield
    finally:
        _waiting.reset(token)


_alone: ContextVar[bool] = ContextVar("trl_turbo_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """While open, a `TurboLLM` that cannot share raises `EngineDeclinedError` and starts no engine of its own."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def must_share() -> bool:
    """Whether an engine with a copy of the weights is worse than none."""
    return _alone.get()


def take() -> Trainee | None:
    """Return who waits for an engine, once."""
    find = _waiting.get()
    if find is None:
        return None
    _waiting.set(None)
    return find()
