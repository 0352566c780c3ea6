"""Each example runs as a user runs it, without and with the one line, and prints the same losses."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAINERS = ("grpo", "rloo", "dpo", "online_dpo", "ppo")
# Two fp32 runs that sum in another order: an epsilon of 1.2e-7 over sums of the order of a thousand terms. How closely
# each trainer agrees is the business of tests/trainers; here a wrong or missing term of the loss must show.
SLACK = 1e-4


def has_ppo() -> bool:
    return find_spec("trl.experimental") is not None and find_spec("trl.experimental.ppo") is not None


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", "2", *arguments]
    return subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def steps(done: subprocess.CompletedProcess[str]) -> list[dict[str, float]]:
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step"')]


@pytest.mark.slow
@pytest.mark.trl
@pytest.mark.parametrize("name", TRAINERS)
def test_prints_the_same_losses_with_the_one_line(name: str) -> None:
    if name == "ppo" and not has_ppo():
        pytest.skip("this TRL has no PPO")
    stock, turbo = steps(run(name)), steps(run(name, "--turbo"))
    assert len(stock) == len(turbo) == 2
    for before, after in zip(stock, turbo, strict=True):
        assert after == pytest.approx(before, rel=SLACK, abs=SLACK)
    # Two runs that train nothing agree as well.
    moving = "loss/value_avg" if name == "ppo" else "grad_norm"
    assert any(entry[moving] > 0 for entry in stock)


@pytest.mark.slow
def test_ppo_says_in_one_sentence_that_this_trl_has_none() -> None:
    if has_ppo():
        pytest.skip("this TRL has PPO")
    done = run("ppo")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("This TRL has no PPO: 1.12 was the last that did; pip install 'trl<1.13'.")


@pytest.mark.parametrize("name", TRAINERS)
def test_is_plain_trl_but_for_one_guarded_line(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    ours = [line.strip() for line in lines if "turbo" in line]
    assert ours == ["if args.turbo:", "import trl_turbo", "trl_turbo.patch()  # the one line"]
