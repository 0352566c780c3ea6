"""After training patched and `unpatch()`, everything is what it was, and a stock run repeats itself bit for bit."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import trl_turbo

from .adapters import lora
from .models import folder, load
from .parity import patched, skip_unless_known
from .rule import assert_identical
from .runs import Case, build, classes, run, train

pytestmark = pytest.mark.trl

TRAINERS = ["GRPO", "RLOO", "DPO", "OnlineDPO", "PPO"]


def touched(trainer: str) -> Iterator[Any]:
    """Every class and module that a patched run of this trainer changes."""
    for kind in classes(trainer):
        yield from (owner for owner in kind.__mro__ if owner.__module__.startswith("trl."))
        yield importlib.import_module(kind.__module__)
    yield importlib.import_module("trl.trainer.utils")
    yield Accelerator
    yield from (owner for owner in type(load(folder())).__mro__ if owner is not object)


def contents(trainer: str) -> list[tuple[Any, dict[str, Any]]]:
    return [(owner, dict(vars(owner))) for owner in touched(trainer)]


@pytest.mark.parametrize("adapter", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_everything_is_what_it_was(trainer: str, adapter: Any) -> None:
    reference = {"ref_model": None} if trainer == "PPO" and adapter else {}
    case = Case(trainer, {} if trainer == "PPO" else {"max_steps": 2}, peft=adapter, extra=lambda path: reference)
    skip_unless_known(case)
    first = run(case)
    before = contents(trainer)
    with patched() as path:
        assert any(dict(vars(owner)) != then for owner, then in before), "patch() changed nothing that is watched"
        run(case)
    path.assert_ours()
    for owner, then in before:
        now = dict(vars(owner))
        changed = [name for name in now.keys() | then.keys() if now.get(name) is not then.get(name)]
        assert not changed, f"{owner}: {changed}"
    assert_identical(first, run(case))


@pytest.mark.parametrize("late", [False, True], ids=["patched-before", "patched-after-construction"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast"])
def test_model_trained_patched_gives_logits_again(precision: str, late: bool) -> None:
    """accelerate keeps, on the instance, the forward that it found: ours is then passed through."""
    case = Case("GRPO", {"max_steps": 1, "beta": 0.1, "bf16": precision != "fp32"})
    trainer = build(case) if late else None
    with patched():
        trainer = trainer or build(case)
        train(trainer)
    ids = torch.arange(3, 9)[None]
    assert trainer.model(input_ids=ids).logits.shape == (1, 6, trainer.model.config.vocab_size)
    assert not any("_trl_turbo" in name for name in vars(trainer.model))


def test_trainer_trains_on_after_unpatch() -> None:
    case = Case("DPO", {"max_steps": 1})
    with patched():
        trainer = build(case)
        train(trainer)
    again = train(trainer)
    assert again.series["training loss"]
    assert not trl_turbo.status().by_status("applied", "blocked")
