"""Autocast, low-precision weights, gradient checkpointing, and when `patch()` comes: stock against patched."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from .adapters import lora
from .models import load
from .parity import check
from .runs import Case

pytestmark = pytest.mark.trl

LOADED_LOW = {"model_init_kwargs": {"dtype": "bfloat16"}}
KL = {"GRPO": {"beta": 0.1}, "RLOO": {"beta": 0.1}}
# Rounded to bf16 a ratio next to its bound falls on either side, and both are right: bounds that nothing reaches
UNCLIPPED = {"beta": 0.1, "epsilon": 0.99, "epsilon_high": 100.0}
SMOOTH = {"GRPO": UNCLIPPED, "RLOO": UNCLIPPED}
TRAINERS = ["GRPO", "RLOO", "DPO", "OnlineDPO"]


def low(path: str) -> Any:
    return load(path).to(torch.bfloat16)


@pytest.mark.parametrize("late", [False, True], ids=["patched-before", "patched-after-construction"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_autocast(trainer: str, late: bool) -> None:
    """The reference model is prepared inside `__init__`, the policy by `train()`: both score under autocast."""
    path = check(
        Case(trainer, {"bf16": True, "max_steps": 2, **SMOOTH.get(trainer, {})}, dtype=torch.bfloat16), late=late
    )
    assert {call.grad for call in path.kernel} == {True, False}, "policy and reference were not both scored"
    assert all(call.autocast or call.dtype == torch.bfloat16 for call in path.kernel)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_autocast_with_lora(trainer: str) -> None:
    check(Case(trainer, {"bf16": True, "max_steps": 2, **SMOOTH.get(trainer, {})}, dtype=torch.bfloat16, peft=lora()))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_bf16_weights(trainer: str) -> None:
    check(Case(trainer, {"max_steps": 2, **SMOOTH.get(trainer, {})}, dtype=torch.bfloat16, model=low))


def test_bf16_weights_under_an_fp32_head() -> None:
    options = {"max_steps": 2, "cast_lm_head_to_fp32": True, **UNCLIPPED, **LOADED_LOW}
    check(Case("GRPO", options, family="qwen2-untied", dtype=torch.bfloat16))


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_gradient_checkpointing(trainer: str, reentrant: bool, peft: Any) -> None:
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        "max_steps": 2,
        **KL.get(trainer, {}),
    }
    check(Case(trainer, options, peft=peft))


@pytest.mark.parametrize("trainer", ["GRPO", "DPO"])
def test_patched_after_construction(trainer: str) -> None:
    check(Case(trainer, {"max_steps": 2, **KL.get(trainer, {})}), late=True)


@lru_cache
def own(trainer: type) -> type:
    """A subclass as users write them; made once, by the stock run, so that it is older than `patch()`."""

    class Own(trainer):  # type: ignore[misc, valid-type]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    return Own


@pytest.mark.parametrize("trainer", ["GRPO", "RLOO", "DPO"])
def test_subclass_older_than_patch(trainer: str) -> None:
    check(Case(trainer, {"max_steps": 2}, subclass=own))
