"""A run that is killed goes on from its last checkpoint, with an engine that samples from what was saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.trl, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 6

SCRIPT = """
import json, sys
from pathlib import Path
import peft
import trl_turbo
from tests.engine.trainers import metric, trainer
trl_turbo.patch(rollout=True, verbose=False)
folder, resume = Path(sys.argv[1]), sys.argv[2] == "resume"
config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
settings = dict(max_steps=int(sys.argv[3]), learning_rate=2e-2, save_strategy="steps", save_steps=1, save_total_limit=3)
trained = trainer("GRPO", folder, peft_config=config, **settings)
assert trained.vllm_generation.llm.shared is not None, trained.vllm_generation.llm.declined
trained.train(resume_from_checkpoint=resume or None)
history = [entry for entry in trained.state.log_history if "loss" in entry]
print("RESULT", json.dumps({"steps": [entry["step"] for entry in history],
    "gaps": metric(trained, "sampling/sampling_logp_difference/mean")}))
"""


def start(folder: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), how, str(STEPS)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_run_goes_on(tmp_path):
    first = start(tmp_path, "anew")
    saved = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    deadline = time.monotonic() + 300
    while not saved.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    output = first.communicate()[0]
    assert saved.exists(), output[-3000:]
    assert first.returncode == -signal.SIGKILL, "it ended before it was killed"

    again = start(tmp_path, "resume")
    output = again.communicate(timeout=600)[0]
    found = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
    assert found, output[-3000:]
    # No step is lost and none is counted twice: those before the kill come from the checkpoint's own history
    assert found[0]["steps"] == list(range(1, STEPS + 1))
    assert max(found[0]["gaps"]) < 1e-3, found
