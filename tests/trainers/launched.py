"""Processes of their own for what several tests look at: one launch serves them all, as loading TRL takes longest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from .models import PACKED

ROOT = Path(__file__).parents[2]
# As in conftest.py
PADDED = {"TRL_TURBO_PACKING": "0", "TRL_TURBO_ATTENTION": "0"}
OFF = {f"TRL_TURBO_{feature}": "0" for feature in ("ROLLOUT", "DASHBOARD", "GUARDS")} | ({} if PACKED else PADDED)
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module")


def launched(
    factory: pytest.TempPathFactory,
    module: str,
    *args: str,
    python: Sequence[str] = ("-m",),
    env: Mapping[str, str] = ON_CPU,
) -> Path:
    """Run a module of this folder once in a session, with a folder as its last argument; returns the folder.

    Args:
        factory: pytest's.
        module: Its name.
        args: What it is called with first.
        python: Arguments of Python before the module's.
        env: Of the process, beside this one's.
    """
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / "-".join((module, *args))
    with FileLock(f"{out}.lock"):  # under pytest-xdist the tests below are spread over workers
        if not (out / "done").exists():
            out.mkdir(exist_ok=True)
            result = subprocess.run(
                [sys.executable, *python, f"tests.trainers.{module}", *args, str(out)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **OFF, **env},
                capture_output=True,
                text=True,
                timeout=800,
                check=False,
            )
            assert result.returncode == 0, result.stderr[-4000:]
            (out / "done").touch()
    return out


def of_ranks(out: Path) -> list[dict[str, Any]]:
    """What each of two ranks wrote into the folder."""
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


def equal_on_ranks(ranks: list[dict[str, Any]], label: str) -> list[Any]:
    """The patched outcome of each rank, which must be equal to the bit; skips what was not trained, and says why."""
    if isinstance(ranks[0][label], str):
        pytest.skip(ranks[0][label])
    ours = [rank[label]["patched"] for rank in ranks]
    for group, tensors in ours[0].tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, ours[1].tensors[group][name]), f"{group} of {name} differs between the ranks"
    return ours
