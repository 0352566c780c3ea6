"""`use_liger_kernel=True` up to TRL 1.14: TRL scores with Liger, around what is patched here. The report says so."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from trl_turbo.patching import Replacement
from trl_turbo.report import note

# Up to 1.13 the training loss of GRPO, and of DPO with its reference; in 1.14 every pass of GRPO
METHODS = ("compute_liger_loss", "_compute_loss_liger", "_chunked_logps")


def replacements(trainer: type) -> Iterator[Replacement]:
    """Those of the methods that `trainer` has."""
    for name in METHODS:
        if hasattr(trainer, name):
            yield Replacement(trainer, name, _noted)


def say(trainer: Any) -> None:
    """Put into the report that these tokens are not scored by this package."""
    note(
        "logprob",
        f"{type(trainer).__name__}: use_liger_kernel=True has TRL score with Liger's kernel where it can; TRL's own "
        "path is used there",
    )


def _noted(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        say(self)
        return original(self, *args, **kwargs)

    return method
