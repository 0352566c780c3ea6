"""Two processes on the CPU, by `torch.distributed.run`; one launch serves all tests of a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parents[2]
# As in conftest.py, for the two processes.
QUIET = {"TRL_TURBO_DASHBOARD": "0", "TRL_TURBO_GUARDS": "0"}


def ranks(
    factory: pytest.TempPathFactory, name: str, worker: str, *args: str, env: Mapping[str, str]
) -> list[dict[str, Any]]:
    """What each rank of `tests.trainers.<worker>` found, which it is told to write into the folder that comes last.

    Args:
        factory: pytest's.
        name: Of the launch, which is not repeated.
        worker: Of its module.
        args: What it is called with first.
        env: Of the processes, beside this one's.
    """
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / name
    with FileLock(f"{out}.lock"):  # under pytest-xdist the tests of a file are spread over workers
        if not (out / "rank-0.pt").exists():
            _launch(out, worker, args, env)
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


def _launch(out: Path, worker: str, args: tuple[str, ...], env: Mapping[str, str]) -> None:
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, "--module", f"tests.trainers.{worker}", *args, str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **QUIET, **env},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
