"""Which batches are small, how a module runs something else for a while, and what is said where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trl_turbo.report import note

#: Larger batches keep vLLM's kernels, which are made for them.
MOST_ROWS = 16


def decodes(rows: int) -> bool:
    """Whether vLLM's model runs a batch of few sequences, with one new token each, that knows its cache."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if rows > MOST_ROWS or not is_forward_context_available():
        return False
    context = get_forward_context()
    found = context.attn_metadata
    if not isinstance(found, dict) or not isinstance(context.slot_mapping, dict):
        return False
    return all(getattr(each, "max_query_len", 0) == 1 for each in found.values())


@contextmanager
def runs(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, `module(...)` is `forward(...)`."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def unexpected(module: str, what: str) -> None:
    """A model does between two of its modules what was not known when the first one was left to the second.

    vLLM warms each batch up before it captures it, and nobody reads those numbers: there it is enough that the caller
    does not do so again, and that the report says so.

    Raises:
        RuntimeError: In a capture.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{module} got {what}; call patch(rollout_kernels='off') and report it")
    note("rollout", f"decode steps run vLLM's kernels around {module}, which got {what}")


def first_line(error: Exception) -> str:
    """What an error says, in short: those of compilers and drivers go on for pages."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
