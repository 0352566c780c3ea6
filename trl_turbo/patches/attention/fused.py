"""TRL 1.15 and later: what its fused head is called with is put on a layout, and its answers are spread again.

TRL sets a forward on the model itself, which runs the model and scores labels that are shifted already as they stand.
Ours stands in front of it: it packs the batch, hands on shifted labels, and gives the fields back in TRL's shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import MethodType, ModuleType
from typing import Any

import torch

from trl_turbo.patches.logprob import forward as scoring
from trl_turbo.patches.logprob.hook import causal_lms, takes_fused_lm_head
from trl_turbo.patches.logprob.request import IGNORED, next_token
from trl_turbo.patching import Replacement, extend

# Methods through which every pass goes, whose first argument is the model
METHODS = ("_get_per_token_logps_and_entropies", "_compute_loss", "compute_ref_log_probs", "_compute_ref_log_probs")
_MARK = "trl_turbo_arranges"


def probe(module: ModuleType, feature: str, trainer_name: str) -> str | None:  # noqa: ARG001
    """Why a trainer's module does not fit, or `None`."""
    if not hasattr(module, "add_fused_lm_head"):
        return f"{module.__name__} no longer uses add_fused_lm_head"
    return None if hasattr(module, trainer_name) else f"{module.__name__} has no {trainer_name}"


def build(module: ModuleType, feature: str, trainer_name: str) -> Iterator[Replacement]:
    """The function that sets TRL's forward, and for trainers that are older than the patch, their passes."""
    yield Replacement(module, "add_fused_lm_head", functools.partial(_then_in_front, feature))
    trainer = getattr(module, trainer_name)
    for name in METHODS:
        if hasattr(trainer, name):
            yield Replacement(trainer, name, functools.partial(_in_front_first, feature))


def stand_in_front(feature: str, model: Any) -> None:
    """Stand in front of TRL's forward of a model, where it has one and nothing of ours does."""
    own = vars(model).get("forward")
    chain = list(_chain(own))
    if any(takes_fused_lm_head(function) for function in chain) and not any(_marked(function) for function in chain):
        extend(f"{feature}.passes", Replacement(model, "forward", functools.partial(_fronted, model)))


def _then_in_front(feature: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> None:
        original(model, *args, **kwargs)
        stand_in_front(feature, model)

    return add_fused_lm_head


def _in_front_first(feature: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        for held in (model, getattr(self, "ref_model", None)):
            if held is not None:
                for causal_lm in causal_lms(held):
                    stand_in_front(feature, causal_lm)
        return original(self, model, *args, **kwargs)

    return method


def _fronted(model: Any, original: Callable[..., Any]) -> Any:
    inner = (
        original.__func__ if isinstance(original, MethodType) else lambda _, *args, **kwargs: original(*args, **kwargs)
    )

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if kwargs.get("fused_lm_head") is not True or labels is None or kwargs.get("shift_labels") is not None:
            return inner(self, *args, **kwargs)
        own = ("labels", "shift_labels", "fused_lm_head", "num_items_in_batch")
        rest = {name: value for name, value in kwargs.items() if name not in own}
        targets = next_token(labels)
        arranged = scoring.arrange(self, inner, args, rest, targets)
        if arranged is None:
            return inner(self, *args, **kwargs)
        asked = {"labels": labels} if arranged.rows is None else {"shift_labels": arranged.targets}
        items = kwargs.get("num_items_in_batch")
        output = inner(self, **arranged.kwargs, **asked, fused_lm_head=True, num_items_in_batch=items)
        arranged.ran()
        if arranged.rows is not None:
            for name, value in list(output.items()):
                if isinstance(value, torch.Tensor) and value.shape == arranged.targets.shape:
                    output[name] = arranged.rows.spread(value)[:, :-1]
            output["label_mask"] = (targets != IGNORED)[:, :-1]
        return output

    vars(forward)[_MARK] = True
    return MethodType(forward, model)


def _marked(function: Any) -> bool:
    return _MARK in getattr(function, "__dict__", {})


def _chain(function: Any) -> Iterator[Any]:
    """What an instance's forward calls, as far as its wrappers tell."""
    for _ in range(16):  # a chain is a few wrappers long
        if function is None:
            return
        yield function
        function = getattr(function, "__func__", None) or getattr(function, "__wrapped__", None)
