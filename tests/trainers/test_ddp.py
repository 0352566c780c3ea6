"""Two processes, gloo, on the CPU: ranks stay equal, and patched equals stock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from .ddp_worker import LABELS
from .rule import assert_same

pytestmark = [pytest.mark.trl, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
# As in conftest.py, for the two processes.
QUIET = {"TRL_TURBO_DASHBOARD": "0", "TRL_TURBO_GUARDS": "0"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, for every training; one launch serves all tests, as loading TRL takes longest."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / "ddp"
    with FileLock(f"{out}.lock"):  # under pytest-xdist the tests below are spread over workers
        if not (out / "rank-0.pt").exists():
            _launch(out)
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


def _launch(out: Path) -> None:
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, "--module", "tests.trainers.ddp_worker", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **QUIET},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]


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
