"""OnlineDPO: policy and reference pass go through `_forward`, which still makes all logits in TRL 1.16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.compat.signatures import misfit
from trl_turbo.patches.logprob.hook import hook_models
from trl_turbo.patches.logprob.request import Request, completion_targets, left_to_trl, scoring
from trl_turbo.patching import Replacement

FIRST = ("self", "model", "prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def probe(module: ModuleType) -> str | None:
    """Why the module does not fit, or `None`."""
    owner = getattr(module, "OnlineDPOTrainer", None)
    return f"{module.__name__} has no OnlineDPOTrainer" if owner is None else misfit(owner, {"_forward": FIRST})


def build(module: ModuleType) -> Iterator[Replacement]:
    """The one method that both passes go through."""
    yield Replacement(module.OnlineDPOTrainer, "_forward", _scored)


def _scored(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(
        self: Any, model: Any, prompt_ids: Any, prompt_mask: Any, completion_ids: Any, completion_mask: Any, *args: Any
    ) -> Any:
        def run() -> Any:
            return original(self, model, prompt_ids, prompt_mask, completion_ids, completion_mask, *args)

        if left_to_trl(self):
            return run()
        hook_models(model)
        # The trainer's KL and entropy metrics sum over padding too, so padding is scored like the rest
        with scoring(Request(targets=completion_targets(completion_ids.size(1), masked=False))):
            return run()

    return method
