"""A process of its own for what several tests look at: one launch serves them all, as loading TRL takes longest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
# As in conftest.py
OFF = {f"TRL_TURBO_{feature}": "0" for feature in ("ROLLOUT", "DASHBOARD", "GUARDS")}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module")


def launched(factory: pytest.TempPathFactory, module: str, python: Sequence[str] = ("-m",)) -> Path:
    """Run a module of this folder once in a session, with a folder as its argument; returns the folder.

    Args:
        factory: pytest's.
        module: Its name.
        python: Arguments of Python before the module's.
    """
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / module
    with FileLock(f"{out}.lock"):  # under pytest-xdist the tests of a file are spread over workers
        if not (out / "done").exists():
            out.mkdir(exist_ok=True)
            result = subprocess.run(
                [sys.executable, *python, f"tests.trainers.{module}", str(out)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **OFF},
                capture_output=True,
                text=True,
                timeout=800,
                check=False,
            )
            assert result.returncode == 0, result.stderr[-4000:]
            (out / "done").touch()
    return out
