"""What a trainer tells the engine that is about to be built for it; imports neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from trl_turbo.engine.plan import Work


@dataclass(frozen=True)
class Trainee:
    """The model that an engine serves.

    Attributes:
        model: The trainer's model, unwrapped by accelerate, with its adapter.
        accelerator: The trainer's, or `None`.
        work: Its rollouts.
    """

    model: Any
    accelerator: Any
    work: Work


_waiting: ContextVar[Trainee | None] = ContextVar("trl_turbo_trainee", default=None)


@contextmanager
def serving(trainee: Trainee) -> Iterator[None]:
    """While open, the first `TurboLLM` that is built serves this trainee; further ones are plain `vllm.LLM`."""
    token = _waiting.set(trainee)
    try:
        yield
    finally:
        _waiting.reset(token)


def take() -> Trainee | None:
    """Return who waits for an engine, once."""
    trainee = _waiting.get()
    if trainee is not None:
        _waiting.set(None)
    return trainee
