"""Two processes, gloo, on the CPU: ranks stay equal, and patched equals stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .ddp_worker import LABELS
from .launched import TORCHRUN, launched, of_ranks
from .rule import assert_same

pytestmark = [pytest.mark.trl, pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, for every training."""
    return of_ranks(launched(tmp_path_factory, "ddp_worker", python=TORCHRUN))


@pytest.mark.parametrize("label", LABELS)
def test_two_processes(ranks: list[dict[str, Any]], label: str) -> None:
    if isinstance(ranks[0][label], str):
        pytest.skip(ranks[0][label])
    ours = [rank[label]["patched"] for rank in ranks]
    for group, tensors in ours[0].tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, ours[1].tensors[group][name]), f"{group} of {name} differs between the ranks"
    assert ours[0].series["training loss"] != ours[1].series["training loss"] or label.startswith("PPO"), "same data"
    for rank in ranks:
        found = rank[label]
        found["path"].assert_ours()
        assert_same(found["stock"], found["patched"], found["perturbed"])
