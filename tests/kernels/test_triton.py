"""Runs `twins.py` where Triton can: interpreted on any machine, compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TWINS = Path(__file__).with_name("twins.py")


def run(**env: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(TWINS)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, cwd=TWINS.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no build for this platform")
def test_twins_interpreted():
    run(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_twins_compiled():
    run(TRITON_INTERPRET="0")
