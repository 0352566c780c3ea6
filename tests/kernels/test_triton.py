"""Runs each `twins.py` where Triton can: interpreted on any machine, compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TWINS = [
    HERE / "twins.py",
    *(
        HERE / op / "twins.py"
        for op in (
            "lora_fold",
            "token_logprob",
            "rms_norm",
            "rope",
            "gated",
            "attention",
            "lora",
            "dequantise",
            "paged_attention",
            "skinny",
        )
    ),
]
each_file = pytest.mark.parametrize("twins", TWINS, ids=lambda path: path.parent.name)


def run(twins: Path, **env: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(twins)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@each_file
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no build for this platform")
def test_twins_interpreted(twins):
    run(twins, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@each_file
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_twins_compiled(twins):
    run(twins, TRITON_INTERPRET="0")
