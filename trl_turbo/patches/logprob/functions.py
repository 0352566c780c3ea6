"""TRL's module-level functions of logits, taught to read the statistics off `ScoredLogits`.

They are globals of the trainer modules, looked up at call time, so replacing them there reaches every caller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.patches.logprob.scored import ScoredLogits
from trl_turbo.patching import Replacement

NAMES = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")


def replacements(module: ModuleType) -> Iterator[Replacement]:
    """Those of the functions that `module` has."""
    answers: dict[str, Callable[..., Any]] = {
        "selective_log_softmax": _selective_log_softmax,
        "entropy_from_logits": _entropy_from_logits,
        "selective_log_softmax_and_entropy": _both,
    }
    for name in NAMES:
        if hasattr(module, name):
            yield Replacement(module, name, functools.partial(_or_original, answers[name]))


def _or_original(answer: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(logits: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(logits, ScoredLogits):
            return answer(logits, *args, **kwargs)
        return original(logits, *args, **kwargs)

    return function


# `temperature` and `row_mask` came with TRL 1.14; rows that are masked were not asked about and are zero already
def _selective_log_softmax(
    logits: ScoredLogits,
    index: Any,
    temperature: float = 1.0,
    row_mask: Any = None,  # noqa: ARG001
) -> Any:
    return (logits / temperature).log_probs_of(index)


def _entropy_from_logits(logits: ScoredLogits, chunk_size: int = 128) -> Any:  # noqa: ARG001
    return logits.entropy()


def _both(
    logits: ScoredLogits,
    index: Any,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Any = None,  # noqa: ARG001
) -> Any:
    logits = logits / temperature
    entropy = logits.entropy()
    return logits.log_probs_of(index), entropy if entropy_requires_grad else entropy.detach()
