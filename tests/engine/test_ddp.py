"""Two gloo ranks on the CPU, with an engine on each: real vLLM, real TRL, launched as scripts are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trl_turbo.patches.resume.checkpoints import whole

pytestmark = [pytest.mark.vllm, pytest.mark.trl, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# accelerate has no launcher for several processes on CPUs but mpirun; this one is torchrun, with accelerate's variables
ACCELERATE = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
GAP = 1e-3  # as in one process
EXIT_S = 60


def launch(launcher: tuple[str, ...], *script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, *script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found in every scenario; one launch serves all tests, as loading vLLM takes longest."""
    out = tmp_path_factory.mktemp("ddp")
    result = launch(TORCHRUN, "--module", "tests.engine.ddp_worker", str(out))
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


def check(found: list[dict[str, Any]], steps: int = 3) -> None:
    """Each rank has an engine over its own weights, which samples from them as they are after the last update."""
    for rank in found:
        assert rank["shared"], rank["declined"]
        assert rank["steps"] == steps
        assert rank["moved"] == 0
        assert rank["by vllm"] == rank["by transformers"]
        assert rank["unequal"] == []
        assert max(rank["gaps"], default=0.0) < GAP
    assert found[0]["by vllm"] == found[1]["by vllm"]


def test_each_rank_samples_its_prompts_from_its_own_weights(ranks):
    split, full = ([rank[name] for rank in ranks] for name in ("split", "full"))
    check(full)
    for stock, ours in zip(split, full, strict=True):
        assert ours["asked"][: len(stock["asked"])] == stock["asked"]
    assert split[0]["asked"] != split[1]["asked"], "both ranks have the same prompts, so that nothing was compared"
    assert full[0]["sampled"] != full[1]["sampled"]


def test_vllm_loads_the_model_before_ranks_know_of_each_other(ranks):
    found = [rank["vllm first"] for rank in ranks]
    check(found)
    assert found[0]["asked"] == found[1]["asked"]
    assert found[0]["sampled"][0] != found[1]["sampled"][0]


@pytest.mark.parametrize("way", ["merged", "served"])
def test_adapters(ranks, way):
    found = [rank[way] for rank in ranks]
    check(found)
    assert [rank["merged"] for rank in found] == [way == "merged"] * 2
    # After the same training, folded or not: the base that both started from did not move
    assert found[0]["by vllm"] == ranks[0]["served"]["by vllm"] != ranks[0]["full"]["by vllm"]


@pytest.mark.parametrize("way", ["routed", "online"])
def test_scripts_without_vllm_are_routed_on_both_ranks(ranks, way):
    found = [rank[way] for rank in ranks]
    check(found)
    for rank in found:
        assert any("though the script says use_vllm=False" in note for note in rank["notes"]), rank["notes"]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("not routed", "generation_kwargs has 'num_beams'"),
        ("before", "model_impl='transformers' builds vLLM's model"),
        ("loading", "vLLM did not start on the trainer's weights (RuntimeError: planted)"),
        ("compared", "vLLM did not start on the trainer's weights (RuntimeError: planted)"),
        ("with a copy", "vLLM did not start on the trainer's weights (RuntimeError: planted)"),
    ],
)
def test_what_one_rank_declines_no_rank_does(ranks, case, reason):
    found = [rank[case] for rank in ranks]
    kept = "TRL's own engine is used" if case == "with a copy" else "transformers samples, as the script says"
    for rank, others in enumerate(("rank 1 of 2: ", "")):
        assert not found[rank]["shared"]
        assert found[rank]["use_vllm"] is (case == "with a copy")
        assert found[rank]["steps"] == 1
        assert len(found[rank]["notes"]) == 1
        assert f"{others}{reason}" in found[rank]["notes"][0]
        assert kept in found[rank]["notes"][0]
    assert "rank 1 of 2" not in found[1]["notes"][0]


def test_a_rank_that_raises_in_a_rollout_ends_the_job(tmp_path):
    result = launch(ACCELERATE, "--module", "tests.engine.ddp_worker", str(tmp_path), "dying")
    ended = time.time()
    assert result.returncode != 0
    assert ended - float((tmp_path / "rank-1" / "struck").read_text()) < EXIT_S
    errors = [line for line in result.stderr.splitlines() if re.match(r"(\[rank\d\]: )?\w+Error: ", line)]
    assert "ArithmeticError: planted in a rollout" in errors[0], result.stderr[-4000:]
    assert whole(tmp_path / "rank-0" / "out" / "checkpoint-2")
    assert not (tmp_path / "rank-0" / "out" / "checkpoint-3").exists()
