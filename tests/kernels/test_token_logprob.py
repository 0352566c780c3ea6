"""`token_logprob` on the CPU, and its kernel where Triton can: interpreted anywhere, compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_turbo.kernels.token_logprob import token_logprob

TWIN = Path(__file__).with_name("token_logprob_twin.py")


def run(**env: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(TWIN)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, cwd=TWIN.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no build for this platform")
def test_kernel_interpreted():
    run(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_compiled():
    run(TRITON_INTERPRET="0")


def test_log_softmax_and_rank():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, float("-inf"), -1.0, float("-inf")]])
    logps, ranks = token_logprob(logits, torch.tensor([2, 0]))
    torch.testing.assert_close(logps, logits.log_softmax(-1)[[0, 1], [2, 0]])
    assert ranks.tolist() == [3, 1]


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"logits \[N, V\] and tokens \[N\]; found \[2, 4\] and \[3\]"):
        token_logprob(torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))
