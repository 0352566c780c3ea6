"""Two processes, gloo, on the CPU: ranks stay equal, and patched equals stock."""

from __future__ import annotations

from typing import Any

import pytest

from .ddp_worker import LABELS
from .launched import TORCHRUN, equal_on_ranks, launched, of_ranks
from .rule import assert_same

pytestmark = [pytest.mark.trl, pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, for every training."""
    return of_ranks(launched(tmp_path_factory, "ddp_worker", python=TORCHRUN))


@pytest.mark.parametrize("label", LABELS)
def test_two_processes(ranks: list[dict[str, Any]], label: str) -> None:
    ours = equal_on_ranks(ranks, label)
    assert ours[0].series["training loss"] != ours[1].series["training loss"] or label.startswith("PPO"), "same data"
    for rank in ranks:
        found = rank[label]
        found["path"].assert_ours()
        assert_same(found["stock"], found["patched"], found["perturbed"])


# Two optimizer steps with one rollout each: passes with gradients, and without, the reference's one or two a rollout
SCORED = {"RLOO-lora-one-step": (2, 2), "RLOO-lora-accumulated": (4, 2 + 4)}


@pytest.mark.parametrize("label", SCORED)
def test_a_rollouts_first_micro_batch_is_scored_once(ranks: list[dict[str, Any]], label: str) -> None:
    for rank in ranks:
        assert rank[label]["passes"] == SCORED[label]
        assert [("DDP takes one" in text) for text in rank[label]["path"].others] == [True] * ("accum" in label)
