"""Two processes, gloo, on the CPU: a real vLLM with tensor parallel 2, and beside FSDP2, that takes adapters alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.parallel_worker import LABELS

pytestmark = [pytest.mark.vllm, pytest.mark.trl, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PUSHED = ("adapter", "one kv head", "fused linears", "fsdp", "fsdp, one rank reads")


def _launch(what: str, out: Path) -> subprocess.CompletedProcess[str]:
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    left = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by a trainer in this process
    return subprocess.run(
        [*command, "--module", "tests.engine.parallel_worker", what, str(out)],
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if name not in left},
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "TRL_TURBO_DASHBOARD": "0",
            "TRL_TURBO_GUARDS": "0",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, for every training."""
    out = tmp_path_factory.mktemp("parallel")
    result = _launch(";".join(LABELS), out)
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


def _equal(ranks: list[dict[str, Any]], label: str) -> None:
    first, second = (rank[label]["trained"] for rank in ranks)
    assert first
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between the ranks"


@pytest.mark.parametrize("label", PUSHED)
def test_each_sync_pushes_the_adapter_alone(ranks: list[dict[str, Any]], label: str) -> None:
    """vLLM's log-probs of what it sampled are those of the trainer after each update, on every rank."""
    for rank in ranks:
        found = rank[label]
        assert found["served"], found["notes"]
        assert not found["shared"]
        assert not found["copies"]
        assert found["sharded"] is label.startswith("fsdp")
        assert len(found["gaps"]) == 3
        assert max(found["gaps"]) < 1e-3, found["gaps"]  # as for an engine that shares: see test_rollout
        assert len(found["notes"]) == 1
        assert "the adapter alone" in found["notes"][0]
    _equal(ranks, label)


@pytest.mark.parametrize("label", ["control", "fsdp control"])
def test_control_without_a_push_the_log_probs_part(ranks: list[dict[str, Any]], label: str) -> None:
    for rank in ranks:
        assert rank[label]["served"]
        assert max(rank[label]["gaps"]) > 1e-2, rank[label]["gaps"]


def test_another_base_than_the_checkpoint_is_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    """The weights of one rank are not the checkpoint's: all take TRL's own path, or they would wait for one another."""
    for rank in ranks:
        found = rank["another base"]
        assert not found["served"]
        assert len(found["gaps"]) == 1
        (note,) = found["notes"]
        assert "are not the trainer's: on rank 1, vLLM's log-probs" in note
        assert note.endswith("TRL's own engine is used, with a copy of the weights")


def test_full_fine_tuning_keeps_trls_own_sync(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["full"]
        assert not found["served"]
        (note,) = found["notes"]
        assert "tensor_parallel_size is 2" in note
        assert note.endswith("TRL's own engine is used, with a copy of the weights")
    _equal(ranks, "full")


def test_a_rank_that_raises_ends_the_job_with_its_error(tmp_path: Path) -> None:
    result = _launch("raises", tmp_path)
    ended = time.time()
    assert result.returncode != 0
    assert "RuntimeError: the reward of rank 1 failed" in result.stderr
    raised = float((tmp_path / "raised").read_text())
    assert ended - raised < 60
