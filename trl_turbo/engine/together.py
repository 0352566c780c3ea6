"""Ranks start an engine alike or not at all.

vLLM makes process groups and takes a least over all ranks while it starts, and TRL waits for everyone after it: a rank
that declined alone, or ran out of memory there, would leave the others waiting until the group's timeout, half an hour.
So every rank says how it stands before each of these, and one rank's reason is everybody's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from trl_turbo.engine.errors import EngineDeclinedError


class _AgreedError(EngineDeclinedError):
    """Every rank knows of it."""


def agreed(reason: str | None = None) -> str | None:
    """Return this rank's reason, else that of the first rank which has one, else `None`. Every rank must call it.

    Args:
        reason: Why this rank does not go on, in a sentence, or `None`.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return reason
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, reason)
    if reason is not None:
        return reason
    return next((f"rank {rank} of {len(said)}: {other}" for rank, other in enumerate(said) if other is not None), None)


@contextmanager
def together() -> Iterator[None]:
    """While open, an engine starts on every rank; an error on one is an `EngineDeclinedError` on the others."""
    try:
        yield
    except _AgreedError:
        raise
    except Exception as error:
        agreed(str(error) if isinstance(error, EngineDeclinedError) else f"{type(error).__name__}: {error}")
        raise
    _go_on()


def _go_on() -> None:
    reason = agreed()
    if reason is not None:
        raise _AgreedError(reason)


def gathered(prompts: Any, group: Any, rank: int) -> tuple[Any, slice | None]:
    """The prompts of all ranks that hold one vLLM together, where each asks it for its own; every one must call it.

    TRL's OnlineDPO does so (0.29 to 1.16), which leaves the ranks' shards multiplying different tokens; GRPO and RLOO
    hand every rank the prompts of all.

    Args:
        prompts: What vLLM's `generate` was asked for on this rank.
        group: A group of these ranks for objects.
        rank: This one's place in it.

    Returns:
        The prompts to sample, the same on all ranks, and where this rank's are among them; `None` where all are its.
    """
    if not isinstance(prompts, list):  # a single one
        return prompts, None
    asked: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(asked, prompts, group=group)
    if all(_same(asked[0], other) for other in asked[1:]):
        return prompts, None
    first = sum(map(len, asked[:rank]))
    return [prompt for some in asked for prompt in some], slice(first, first + len(prompts))


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # tensors among them, of which TRL passes none
        return True


class StartsTogether:
    """A worker of vLLM's that goes into what all ranks must do only if all of them will."""

    def init_device(self) -> None:
        """As vLLM's, which makes process groups here."""
        _go_on()
        super().init_device()  # type: ignore[misc]

    def determine_available_memory(self) -> Any:
        """As vLLM's, after which the executor takes the least of all ranks; the model is loaded by now."""
        found = super().determine_available_memory()  # type: ignore[misc]
        _go_on()
        return found
