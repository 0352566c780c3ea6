"""GRPO and RLOO up to TRL 1.14: the policy, old and reference passes go through one method."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.compat.signatures import misfit
from trl_turbo.patches.logprob import liger
from trl_turbo.patches.logprob.functions import replacements
from trl_turbo.patches.logprob.hook import hook_models
from trl_turbo.patches.logprob.request import Request, completion_targets, left_to_trl, scoring
from trl_turbo.patching import Replacement

FIRST = ("self", "model", "input_ids", "attention_mask", "logits_to_keep")


def method_name(trainer: type) -> str:
    """The method that makes the logits: behind a Liger switch in TRL 1.14, the public one otherwise."""
    return "_full_logits_logps" if hasattr(trainer, "_full_logits_logps") else "_get_per_token_logps_and_entropies"


def probe(module: ModuleType, trainer_name: str) -> str | None:
    """Why the module does not fit, or `None`."""
    trainer = getattr(module, trainer_name, None)
    if trainer is None:
        return f"{module.__name__} has no {trainer_name}"
    reason = misfit(trainer, {method_name(trainer): FIRST})
    if reason is not None:
        return reason
    if not hasattr(module, "selective_log_softmax"):
        return f"{module.__name__} no longer uses selective_log_softmax"
    return None


def build(module: ModuleType, trainer_name: str) -> Iterator[Replacement]:
    """The one method that every pass goes through, and the functions of logits it calls."""
    trainer = getattr(module, trainer_name)
    yield from replacements(module)
    yield Replacement(trainer, method_name(trainer), _scored)
    yield from liger.replacements(trainer)


def _scored(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(
        self: Any, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: Any, *args: Any, **kwargs: Any
    ) -> Any:
        def run() -> Any:
            return original(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

        if left_to_trl(self):
            return run()
        asked = signature.bind(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs).arguments
        hook_models(model)
        # TRL before 1.12 or so averages LUSPO's KL term over padding too: there padding is scored like the rest
        masked = getattr(self, "loss_type", "") != "luspo"
        request = Request(
            targets=completion_targets(logits_to_keep, masked),
            temperature=self.temperature,
            outputs=("logps", "entropy") if asked.get("compute_entropy") else ("logps",),
            # TRL < 1.7 has no entropy bonus: there the entropy feeds metrics and a mask, neither differentiable
            entropy_grad=getattr(self, "_entropy_bonus_enabled", False),
        )
        with scoring(request):
            return run()

    return method
