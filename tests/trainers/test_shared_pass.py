"""A rollout that is trained on in one step is scored once: same training, one forward less."""

from __future__ import annotations

from typing import Any

import pytest

from trl_turbo.patches.shared_pass import trainer as shared

from .adapters import lora
from .parity import check
from .runs import Case

pytestmark = pytest.mark.trl


def passes(path: Any) -> tuple[int, int]:
    """Scoring passes with gradients and without."""
    return sum(call.grad for call in path.kernel), sum(not call.grad for call in path.kernel)


#: One training step a rollout, as TRL's defaults have it
ONE_STEP = {"gradient_accumulation_steps": 1, "steps_per_generation": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "no-beta": {"beta": 0.0},
    "beta": {"beta": 0.1},
    "checkpointing": {"beta": 0.1, "gradient_checkpointing": True},
    "reentrant": {
        "beta": 0.0,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"beta": 0.0, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
}


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("option", OPTIONS)
def test_one_forward_less(option: str, peft: Any) -> None:
    case = Case("RLOO", {**ONE_STEP, **OPTIONS[option]}, peft=peft)
    path = check(case)
    with_gradient, without = passes(path)
    reference = with_gradient if OPTIONS[option]["beta"] else 0
    assert without == reference, "the old policy was scored in a pass of its own"
    assert with_gradient > 0


APART: dict[str, tuple[dict[str, Any], str]] = {
    "two-iterations": ({**ONE_STEP, "num_iterations": 2, "max_steps": 4}, "trained on in 2 passes"),
    "accumulation": ({"gradient_accumulation_steps": 2, "steps_per_generation": 2}, "trained on in 2 passes"),
}


@pytest.mark.parametrize("option", APART)
def test_scored_apart_and_said_so(option: str) -> None:
    options, reason = APART[option]
    path = check(Case("RLOO", {"beta": 0.0, **options}))
    assert [reason in text for text in path.others] == [True]
    assert passes(path)[1] > 0


def test_dropout_is_drawn_as_in_stock() -> None:
    """Two passes draw two masks: what has been scored in one is thrown away, and later rollouts are scored apart."""
    path = check(Case("RLOO", {**ONE_STEP, "beta": 0.0}, peft=lora(lora_dropout=0.5)))
    assert ["draws random numbers" in text for text in path.others] == [True]
    with_gradient, without = passes(path)
    assert without == with_gradient - 2


def test_weights_that_changed_in_between_are_scored_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of what the reuse rests on."""
    count = iter(range(1000))
    monkeypatch.setattr(shared, "_versions", lambda model: (next(count),))
    path = check(Case("RLOO", {**ONE_STEP, "beta": 0.0}))
    with_gradient, without = passes(path)
    assert without == 0
    assert with_gradient % 2 == 0


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_TURBO_SHARED_PASS", "0")
    with_gradient, without = passes(check(Case("RLOO", {**ONE_STEP, "beta": 0.0})))
    assert without == with_gradient
