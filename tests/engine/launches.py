"""Start a worker in two processes of this machine, as people start a training."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
#: What a trainer in this process leaves behind.
LEFT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(worker: str, *args: str, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launched = uuid.uuid4().hex
    result = subprocess.run(
        [*command, "--module", f"tests.engine.{worker}", *args, str(out)],
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if name not in LEFT},
            "OMP_NUM_THREADS": "1",
            "TRL_TURBO_DASHBOARD": "0",
            "TRL_TURBO_GUARDS": "0",
            "LAUNCHED_AS": launched,
            **env,
        },
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    for left in Path("/dev/shm").glob(f"*{launched}*"):  # by a process that was ended
        left.unlink()
    return result


def found(out: Path, result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What each rank found, by label."""
    files = [out / f"rank-{rank}.pt" for rank in range(2)]
    assert all(file.exists() for file in files), result.stderr[-4000:]
    return [torch.load(file, map_location="cpu", weights_only=False) for file in files]


def assert_pushed(found: dict[str, Any], bound: float) -> None:
    """vLLM's log-probs of what it sampled were those of the trainer after each update, and nothing else was synced."""
    assert found["served"], found["notes"]
    assert not found["shared"]
    assert not found["copies"]
    assert len(found["gaps"]) == 3
    assert max(found["gaps"]) < bound, found["gaps"]
    # On a GPU, others say which kernels decode steps run
    first, *more = (note for note in found["notes"] if not note.startswith("decode steps"))
    assert "the adapter alone" in first
    assert all("served unmerged from now on" in note for note in more), more


def assert_equal(ranks: list[dict[str, Any]], label: str) -> None:
    first, second = (rank[label]["trained"] for rank in ranks)
    assert first
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between the ranks"
