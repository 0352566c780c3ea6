"""The rule itself: it accepts what rounding explains and catches small errors planted in the patched run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch as replaced

import pytest
import torch

from trl_turbo.patches.logprob import forward, fused_head

from .parity import TRL_HAS_FUSED_HEAD, more, patched, stock
from .rule import Outcome, assert_same, broken
from .runs import Case, run

pytestmark = pytest.mark.trl

GRPO = Case("GRPO", {"beta": 0.1})
DPO = Case("DPO")
ODPO = Case("OnlineDPO")


def hotter(original: Callable[..., Any]) -> Callable[..., Any]:
    """The temperature off by 1 %."""

    def linear_logprob(*args: Any, temperature: float, **kwargs: Any) -> Any:
        return original(*args, temperature=temperature * 1.01, **kwargs)

    return linear_logprob


def one_left_out(original: Callable[..., Any]) -> Callable[..., Any]:
    """One position in seven masked, in every pass (TRL's own fused head asks about prompts as well on the CPU)."""

    def linear_logprob(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        kept = torch.ones_like(found.logps)
        kept[::7] = 0
        return found._replace(logps=found.logps * kept)

    return linear_logprob


def gradient_off(original: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of the hidden states 0.01 % too large: no loss or metric of the first step shows it."""

    def linear_logprob(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(hidden + 1e-4 * (hidden - hidden.detach()), *args, **kwargs)

    return linear_logprob


def entropy_off(original: Callable[..., Any]) -> Callable[..., Any]:
    """The entropy in the wrong place by a thousandth of a nat."""

    def linear_logprob(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return found if found.entropy is None else found._replace(entropy=found.entropy + 1e-3)

    return linear_logprob


PLANTED = {"GRPO": GRPO, "DPO": DPO, "OnlineDPO": ODPO}


@pytest.mark.parametrize(
    ("trainer", "error"),
    [
        (trainer, error)
        for trainer in PLANTED
        for error in (hotter, one_left_out, gradient_off, entropy_off)
        if (trainer, error) != ("OnlineDPO", entropy_off)  # which asks for no entropy
    ],
)
def test_planted_error_is_caught(trainer: str, error: Callable[..., Any]) -> None:
    case = PLANTED[trainer]
    plain, *perturbed = stock(case)
    with patched():
        modules = [module for module in (forward, fused_head) if hasattr(module, "linear_logprob")]
        wrong = [replaced.object(module, "linear_logprob", error(module.linear_logprob)) for module in modules]
        for change in wrong:
            change.start()
        try:
            found = run(case)
        finally:
            for change in reversed(wrong):
                change.stop()
    assert broken(plain, found, [*perturbed, *more(case)])


@pytest.mark.skipif(not TRL_HAS_FUSED_HEAD, reason="TRL before 1.15 has no fused head of its own in these trainers")
def test_who_serves_trls_fused_head() -> None:
    hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)
    # Narrower than TRL's tile, so that TRL's would be all the logits at once: ours, differentiated or not
    assert fused_head.ours_serves(hidden, weight, chunk_size=8, entropy_differentiated=True)
    # Otherwise TRL's own stays where ours is not measured to be faster: on the CPU
    assert not fused_head.ours_serves(hidden, weight, chunk_size=7, entropy_differentiated=False)


def outcome(series: list[float], tensor: list[float]) -> Outcome:
    values = torch.tensor(tensor, dtype=torch.float64)
    return Outcome({"loss": series}, {"gradient": {"w": values}})


@pytest.mark.parametrize("excess", [0.9, 1.1])
@pytest.mark.parametrize("where", ["series", "tensor"])
def test_the_bound_is_where_it_says(where: str, excess: float) -> None:
    spread, floor = 1e-5, 8 * 2**-24
    size = {"series": 2.0, "tensor": math.sqrt(5.0)}[where]
    error = excess * (4 * spread + floor * size)
    stock_run, moved = outcome([2.0, 1.0], [1.0, 2.0]), outcome([2.0, 1.0 + spread], [1.0 + spread, 2.0])
    ours = outcome([2.0 + error, 1.0], [1.0, 2.0]) if where == "series" else outcome([2.0, 1.0], [1.0 - error, 2.0])
    assert bool(broken(stock_run, ours, [stock_run, moved])) == (excess > 1)


def test_infinities_and_nans_must_match() -> None:
    odd, even = outcome([math.nan, math.inf], [0.0]), outcome([1.0, math.inf], [0.0])
    assert not broken(odd, odd, [odd, odd])
    assert broken(even, odd, [even, even])


def test_more_draws_are_asked_for_only_where_two_leave_it_open() -> None:
    def one(value: float) -> Outcome:
        return Outcome(series={"grad_norm": [value]})

    asked: list[float] = []

    def further() -> list[Outcome]:
        asked.append(1)
        return [one(1.0 + 1e-4)]

    few = [one(1.0 + 1e-6), one(1.0)]
    assert_same(one(1.0), one(1.0 + 3e-6), few, more=further)
    assert not asked
    assert_same(one(1.0), one(1.0 + 3e-4), few, more=further)
    assert asked
    with pytest.raises(AssertionError, match="grad_norm: off by"):
        assert_same(one(1.0), one(1.0 + 5e-4), few, more=further)
