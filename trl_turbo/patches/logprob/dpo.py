"""DPO up to TRL 1.14: one method holds the policy and the reference pass, another precomputes the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.patches.logprob import liger
from trl_turbo.patches.logprob.functions import replacements
from trl_turbo.patches.logprob.hook import hook_models
from trl_turbo.patches.logprob.request import Request, left_to_trl, masked_targets, scoring
from trl_turbo.patching import Replacement
from trl_turbo.report import note

REFERENCE_METHODS = ("_compute_ref_log_probs", "compute_ref_log_probs")  # renamed by TRL 1.14


def probe(module: ModuleType) -> str | None:
    """Why the module does not fit, or `None`."""
    trainer = getattr(module, "DPOTrainer", None)
    if trainer is None or not hasattr(trainer, "_compute_loss"):
        return f"{module.__name__} has no DPOTrainer._compute_loss"
    if not any(hasattr(trainer, name) for name in REFERENCE_METHODS):
        return f"DPOTrainer has none of {', '.join(REFERENCE_METHODS)}"
    if not hasattr(module, "selective_log_softmax"):
        return f"{module.__name__} no longer uses selective_log_softmax"
    return None


def build(module: ModuleType) -> Iterator[Replacement]:
    """The loss, the precomputed reference, and the functions of logits they call."""
    trainer = module.DPOTrainer
    yield from replacements(module)
    yield Replacement(trainer, "_compute_loss", _loss)
    reference = next(name for name in REFERENCE_METHODS if hasattr(trainer, name))
    yield Replacement(trainer, reference, _reference)
    yield from liger.replacements(trainer)


def _request(trainer: Any, inputs: dict[str, Any], outputs: tuple[str, ...]) -> Request | None:
    if left_to_trl(trainer):
        return None
    if getattr(trainer, "use_liger_kernel", False):
        liger.say(trainer)
        return None
    ids, mask = inputs["input_ids"], inputs["completion_mask"]
    if hasattr(trainer, "_truncate_inputs"):  # TRL 0.29 cuts the batch inside the method
        ids, _, mask = trainer._truncate_inputs(ids, inputs["attention_mask"], mask)
    hook_models(trainer.model, trainer.ref_model)
    return Request(targets=masked_targets(ids, mask), outputs=outputs)


def _loss(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if return_outputs:
            note("logprob", "DPO: compute_metrics asks for the logits themselves, so evaluation uses TRL's own path")
            return original(self, model, inputs, return_outputs)
        weighting = ("logsumexp", "logsumexp2") if self.use_weighting else ()
        request = _request(self, inputs, ("logps", "entropy", "mean_logit", "top1", *weighting))
        if request is None:
            return original(self, model, inputs, return_outputs)
        with scoring(request):
            return original(self, model, inputs, return_outputs)

    return method


def _reference(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any) -> Any:
        request = _request(self, args[-1], ("logps",))
        if request is None:
            return original(self, *args)
        with scoring(request):
            return original(self, *args)

    return method
