"""Checkpoints: saved stock or patched, resumed stock or patched, the end is the same."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from .adapters import lora
from .parity import patched
from .rule import Outcome, assert_same
from .runs import Case, build, train

pytestmark = pytest.mark.trl

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
CASES = {
    "GRPO": Case("GRPO", {**STEPS, "beta": 0.1}),
    "GRPO-lora": Case("GRPO", {**STEPS, "beta": 0.1}, peft=lora()),
    "DPO": Case("DPO", STEPS),
    "DPO-lora": Case("DPO", STEPS, peft=lora()),
}


def whole(case: Case, ours: bool, variant: str = "plain") -> tuple[Outcome, str]:
    """All four steps, and the checkpoint of the second."""
    with patched() if ours else nullcontext():
        trainer = build(case, variant)
        outcome = train(trainer)
    return outcome, str(Path(trainer.args.output_dir) / "checkpoint-2")


def resumed(case: Case, checkpoint: str, ours: bool, variant: str = "plain") -> Outcome:
    with patched() if ours else nullcontext():
        return train(build(case, variant), resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("name", CASES)
def test_resumed(name: str) -> None:
    case = CASES[name]
    resume = partial(resumed, case)
    uninterrupted, by_us = whole(case, ours=True)
    _, by_stock = whole(case, ours=False)
    stock = resume(by_stock, ours=False)
    perturbed = [resume(whole(case, False, v)[1], False, v) for v in ("perturbed-1", "perturbed-2")]
    ours = resume(by_us, ours=True)
    for outcome in (ours, resume(by_stock, ours=True), resume(by_us, ours=False)):
        assert_same(stock, outcome, perturbed)
    _assert_continued(uninterrupted, ours)


def _assert_continued(uninterrupted: Outcome, resumed: Outcome) -> None:
    """The resumed run repeats the second half of the uninterrupted one bit for bit."""
    found: dict[str, Any] = {name: series[-2:] for name, series in uninterrupted.series.items()}
    for name in ("training loss", "norm of the gradient"):
        assert found[name] == resumed.series[name]
    for name, update in uninterrupted.tensors["update"].items():
        assert torch.equal(update, resumed.tensors["update"][name]), name
