"""Two processes, gloo, on the CPU: a real vLLM with tensor parallel 2, and beside FSDP2, that takes adapters alone."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engine.launches import assert_equal, assert_pushed, found, launch
from tests.engine.parallel_worker import CASES

pytestmark = [pytest.mark.vllm, pytest.mark.trl, pytest.mark.slow]

Launched = tuple[list[dict[str, Any]], subprocess.CompletedProcess[str], float]
PUSHED = ("one kv head", "fused linears", "folded, asleep", "fsdp", "fsdp, one rank reads")
FOLDED = {"fused linears": 2 * 4, "folded, asleep": 2 * 7, "fsdp, one rank reads": 2 * 7}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """What each rank found, how the job ended, and how many seconds after a rank raised; one launch for all tests."""
    out = tmp_path_factory.mktemp("parallel")
    result = launch("parallel_worker", ";".join(CASES), out=out, ACCELERATE_USE_CPU="true")
    ended = time.time()
    ranks = found(out, result)
    assert (out / "raised").exists(), result.stderr[-4000:]
    return ranks, result, ended - float((out / "raised").read_text())


@pytest.fixture(scope="module")
def ranks(launched: Launched) -> list[dict[str, Any]]:
    return launched[0]


@pytest.mark.parametrize("label", PUSHED)
def test_each_sync_pushes_the_adapter_alone(ranks: list[dict[str, Any]], label: str) -> None:
    for rank in ranks:
        assert_pushed(rank[label], 1e-3)  # as for an engine that shares: see test_rollout
        assert rank[label]["sharded"] is label.startswith("fsdp")
    assert_equal(ranks, label)


@pytest.mark.parametrize("label", PUSHED)
def test_an_engine_with_its_own_base_decodes_in_bursts(ranks: list[dict[str, Any]], label: str) -> None:
    first, second = (rank[label]["steps"] for rank in ranks)
    assert max(first) > 1
    if not label.startswith("fsdp"):  # one vLLM
        assert first == second


@pytest.mark.parametrize("label", FOLDED)
def test_the_adapter_is_folded_into_a_ranks_part_of_the_base(ranks: list[dict[str, Any]], label: str) -> None:
    """All linears of both layers have it, and every bit comes back."""
    for rank in ranks:
        assert rank[label]["folds"] == {"changed": FOLDED[label], "restored": True}
        assert "folded into the base weights" in rank[label]["notes"][0]


def test_an_adapter_too_large_to_be_folded_is_served_unmerged_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["fsdp"]["folds"] == {"changed": False, "restored": True}
        assert "from now on: remembering what rounding loses takes" in rank["fsdp"]["notes"][1]
        for label in ("one kv head", "control"):
            assert rank[label]["folds"] is None
            assert "served unmerged" in rank[label]["notes"][0]


def test_one_vllm_over_both_ranks_has_one_seed_and_one_on_each_has_two(ranks: list[dict[str, Any]]) -> None:
    """A group is sampled by all ranks of a vLLM together; two that each sample their own prompts must not agree."""
    first, second = ranks
    assert first["one kv head"]["seed"] == second["one kv head"]["seed"]
    assert first["fsdp"]["seed"] != second["fsdp"]["seed"]


def test_online_dpo(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["online dpo"]
        assert found["served"], found["notes"]
        assert not found["copies"]
        assert found["differs"] is None
        # TRL's trainer hands each rank's own prompts to the vLLM of both
        assert len(found["own"]) >= 3
        assert all(found["own"])
        assert "different prompts" in found["notes"][1]
    assert_equal(ranks, "online dpo")


def test_sleep_mode_does_not_throw_the_base_away(ranks: list[dict[str, Any]]) -> None:
    """TRL asks for level 2, which discards weights, and then loads all of them again."""
    for rank in ranks:
        for label in ("one kv head", "online dpo"):
            assert rank[label]["levels"]
            assert set(rank[label]["levels"]) == {1}
        assert not rank["full"]["levels"]


def test_control_without_a_push_the_log_probs_part(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["control"]["served"]
        assert max(rank["control"]["gaps"]) > 1e-2, rank["control"]["gaps"]


def test_another_base_than_the_checkpoint_is_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    """The weights of one rank are not the checkpoint's: all take TRL's own path, or they would wait for one another."""
    for rank, whose in zip(ranks, ("rank 1 of 2: ", ""), strict=True):
        found = rank["another base"]
        assert not found["served"]
        assert len(found["gaps"]) == 1
        (note,) = found["notes"]
        assert f"are not the trainer's: {whose}vLLM's log-probs" in note
        assert note.endswith("TRL's own engine is used, with a copy of the weights")


def test_full_fine_tuning_keeps_trls_own_sync(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["full"]
        assert not found["served"]
        (note,) = found["notes"]
        assert "tensor_parallel_size is 2" in note
        assert note.endswith("TRL's own engine is used, with a copy of the weights")
    assert_equal(ranks, "full")


def test_a_rank_that_raises_ends_the_job_with_its_error(launched: Launched) -> None:
    _, result, seconds = launched
    assert result.returncode != 0
    assert "RuntimeError: the reward of rank 1 failed" in result.stderr
    assert seconds < 60


def test_zero_pushes_the_adapter_alone(tmp_path: Path) -> None:
    """Stage 3 shards base and adapter, the base from the moment it is read; stage 2 neither."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    result = launch("zero_worker", out=tmp_path, DS_ACCELERATOR="cpu")
    for rank in found(tmp_path, result):
        for label, stage in rank.items():
            assert stage["served"], stage["declined"]
            assert set(stage["sharded"]) == {label == "zero 3"}
            assert stage["folded"] is (label == "zero 3")
            assert min(stage["stale"]) > 1e-2, stage  # control: before the push
            assert max(stage["pushed"]) < 1e-3, stage
    assert result.returncode == 0, result.stderr[-4000:]
