"""One rank and two train alike on the same global batch, for twenty steps, and go on from each other's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .launched import launched
from .models import VARIANTS
from .ranks_worker import OPTIONS, STEPS
from .rule import Outcome, assert_same

pytestmark = [pytest.mark.trl, pytest.mark.slow]

#: Of metrics, what is the same on every rank; the others are of a rank's own rows, or counted differently by TRL.
COMMON = "norm of the gradient"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(tmp_path_factory, "ranks_worker")


def found(out: Path, job: str, ranks: int) -> list[dict[str, Any]]:
    return [torch.load(out / job / f"rank-{rank}.pt", weights_only=False) for rank in range(ranks)]


def shared(outcome: Outcome, last: int = STEPS) -> Outcome:
    """What ranks have in common: gradients, what was added to the weights, and the last norms of the gradient."""
    return Outcome({COMMON: outcome.series[COMMON][-last:]}, outcome.tensors, outcome.stored)


def unequal(ranks: list[Outcome]) -> list[str]:
    one, other = (rank.tensors["update"] for rank in ranks)
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


def alike(out: Path, name: str, ranks: list[Outcome], last: int = STEPS) -> None:
    """Ranks are equal to the bit, and as close to one stock process as its perturbed runs are."""
    (single,) = found(out, "one-stock", 1)
    stock, *perturbed = (shared(single[f"{name} {variant}"], last) for variant in VARIANTS)
    assert all(len(rank.series[COMMON]) == last for rank in ranks), "a step was lost, or trained twice"
    assert len(ranks) == 1 or not unequal(ranks)
    for rank in ranks:
        assert_same(stock, shared(rank, last), perturbed)


@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_are_one_with_their_batches_together(out: Path, name: str) -> None:
    two = [rank[f"{name} plain"] for rank in found(out, "two", 2)]
    alike(out, name, two)
    assert two[0].series["training loss"] != two[1].series["training loss"], "both ranks had the same rows"


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("job", "ranks"), [("two-then-one", 1), ("one-then-two", 2)])
def test_resumed_on_another_number_of_ranks(out: Path, name: str, job: str, ranks: int) -> None:
    alike(out, name, [rank[name] for rank in found(out, job, ranks)], last=STEPS // 2)


def test_control_a_loss_that_goes_around_ddp_is_noticed(out: Path) -> None:
    assert unequal([rank["GRPO"] for rank in found(out, "unreduced", 2)])
