"""The commands around the runs: with a run's answer given, they print, write JSON and a picture, and judge."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import contest, distributed, longest, measure, plan
from benchmarks.contest import Contestant
from benchmarks.tables import trainings

ANSWER: dict[str, Any] = {
    "peak_gb": 6.0,
    "loaded_gb": 4.0,
    "torch_gb": 5.0,
    "step_s": 1.5,
    "rollout_s": 1.0,
    "train_s": 0.5,
    "tokens_s": 4000.0,
    "sync_ms": 0.0,
    "logp_gap_largest": 0.01,
    "in_use_at_first_gb": 0.5,
    "plan": {"totals": {"rollout": 5 << 30, "scoring": 5 << 30, "backward": 6 << 30}, "moments": {}},
    "phases": {phase: {"predicted": 6 << 30, "measured": 6 << 30} for phase in ("rollout", "training")},
    "memory": None,
}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Call a command with what its runs answer; returns its exit status and what it wrote."""
    # No model, no nvidia-smi; others start processes too, as matplotlib does where it finds fonts for the first time
    said = SimpleNamespace(**vars(subprocess) | {"run": lambda *a, **k: SimpleNamespace(stdout="0\n")})
    for module in (contest, measure, plan):
        monkeypatch.setattr(module, "subprocess", said)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)

    def call(name: str, answer: Any, *arguments: str, out: str = "out") -> tuple[int, dict[str, Any]]:
        command = importlib.import_module(f"benchmarks.{name}")
        monkeypatch.setattr(contest, "run", lambda module, who, log: answer(who))
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--out", str(tmp_path / out)])
        status = command.main()
        path = tmp_path / f"{out}.json"
        assert path.with_suffix(".png").stat().st_size > 0
        return status, json.loads(path.read_text())

    return call


def test_grpo(call: Any, tmp_path: Path) -> None:
    given = []

    def answer(who: Contestant) -> dict[str, Any]:
        given.append(who.arguments)
        return ANSWER

    status, data = call("grpo", answer, "--completion", "4096", "--sleep", "--only", "trl", "trl_turbo", out="grpo_x")
    assert status == 0
    assert set(data["results"]) == {"trl", "trl_turbo"}
    assert all("--sleep" in arguments for arguments in given)
    (line,) = (arguments[-1] for arguments in given if "--before" in arguments)
    assert "checkpointing=True" in line
    for name in ("vllm", "peft", "transformers", "trl"):
        assert name in data["environment"]
    data["environment"] |= {"driver": "x"}
    (tmp_path / "grpo_x.json").write_text(json.dumps(data))
    assert "trl_turbo takes 1.00x the memory" in trainings.grpo(tmp_path)


DPO = ("--trainer", "dpo")


def test_trainers(call: Any) -> None:
    status, data = call(
        "trainers", lambda who: ANSWER, "--trainer", "ppo", "--path", "trl1.12=/x", "--turbo-path", "/x"
    )
    assert status == 0
    assert set(data["results"]) == {"trl1.12", "trl_turbo over the other TRL"}
    status, data = call("trainers", lambda who: ANSWER if "--before" in who.arguments else {"error": "no"}, *DPO)
    assert status == 1
    assert "error" in data["results"]["trl"]
    assert "error" not in data["results"]["trl_turbo"]


def test_plan(call: Any) -> None:
    wanted = plan.predicted("qwen2.5-1.5b", ["--completion", "512"], plan.FEATURES)

    def answer(near: float) -> Any:
        measured = {phase: {"measured": int(size * near)} for phase, size in wanted.items()}
        peak = max(wanted.values()) * near / 2**30 - ANSWER["in_use_at_first_gb"]
        return lambda who: ANSWER | {"phases": measured, "peak_gb": peak}

    status, data = call("plan", answer(1.0), "--only", "0")
    assert status == 0
    assert data["results"][0]["off_by"] == pytest.approx({"rollout": 0, "training": 0, "peak": 0}, abs=1e-6)
    status, _ = call("plan", answer(1.2), "--only", "0")
    assert status == 1


def test_longest(call: Any) -> None:
    def answer(who: Contestant) -> dict[str, Any]:
        n = int(who.arguments[who.arguments.index("--completion") + 1])
        fits = n <= 47_300
        return {"completion": n, "fits": fits, "peak_gb": n / 2000, "micro_batch_s": [1.0], "out_of_memory": "no"}

    status, data = call("longest", answer, "--cap-gb", "24", "--bar", "36000", "--probes", "9")
    assert status == 0
    assert data["longest"] == 47_000
    status, data = call("longest", answer, "--cap-gb", "24", "--bar", "60000", "--probes", "2")
    assert (status, data["longest"]) == (1, 0)
    assert longest.GRAIN == 1000


@pytest.mark.parametrize(("way", "runs"), [("ddp", 4), ("fsdp2", 2), ("tp", 2)])
def test_distributed(call: Any, tmp_path: Path, way: str, runs: int) -> None:
    launchers = []

    def answer(who: Contestant) -> dict[str, Any]:
        launchers.append(who.launcher)
        assert who.one_gpu is not bool(who.launcher)
        if not who.launcher:
            return ANSWER
        link = {"latency_s": 1e-5, "bytes_s": 1e11}
        rank = {"rollouts_s": [1.0, 1.1], "steps_s": [1.5, 1.6], "peak_gb": 6.0}
        several = {"world": 2, "gradient_bytes": 1 << 20, "collectives": {"all_reduce": link, "all_gather": link}}
        return ANSWER | several | {"step_s": 1.6, "ranks": [rank, rank]}

    status, data = call("distributed", answer, "--way", way, out=f"ranks_{way}")
    assert status == 0
    assert len(launchers) == runs == len(data["results"])
    assert sum(not launcher for launcher in launchers) == (2 if way == "ddp" else 0)
    if way == "ddp":
        assert data["results"]["trl_turbo on 2"]["model"]["scaling"] == pytest.approx(2 * 1.5 / 1.6)
    data["environment"] |= {"driver": "x"}
    (tmp_path / f"ranks_{way}.json").write_text(json.dumps(data))
    assert "trl_turbo on 2" in trainings.distributed(tmp_path)
    _, data = call("distributed", answer, "--way", way, "--only", "trl_turbo", out="only")
    assert {name.partition(" on ")[0] for name in data["results"]} == {"trl_turbo"}


def test_distributed_says_what_is_missed() -> None:
    link = {"latency_s": 0.0, "bytes_s": 1e11}
    several = {
        "world": 2,
        "gradient_bytes": 0,
        "collectives": {"all_reduce": link},
        "ranks": [{"rollouts_s": [1.0]}] * 2,
    }
    found = {
        "trl_turbo on 1": ANSWER,
        "trl_turbo on 2": ANSWER | several | {"step_s": 2.0},
        "trl on 2": {"error": "no"},
    }
    assert distributed.verdicts("ddp", found, 2) == [
        "trl on 2 failed: no",
        "2 GPUs give 1.50x the samples of one, and the bar is 1.80x",
    ]
    found = {"trl_turbo on 2": ANSWER | {"peak_gb": 7.0}, "trl on 2": ANSWER}
    assert distributed.verdicts("fsdp2", found, 2) == ["peak GB is 7, and TRL's is 6"]


def test_what_failed_is_told_and_not_what_was_said_on_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "fails_here.py").write_text(
        "import atexit, sys\n"
        "atexit.register(lambda: print('[rank0]:[W1] Warning: nobody called destroy', file=sys.stderr))\n"
        "raise ValueError('no room')\n"
    )
    found = contest.run("fails_here", Contestant(path=str(tmp_path)), tmp_path / "log")
    assert found == {"error": "ValueError: no room"}


def test_a_lone_process_sees_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tells.py").write_text(
        "import json, os\nprint('RESULT ' + json.dumps({'sees': os.environ['CUDA_VISIBLE_DEVICES']}))\n"
    )
    for visible, sees in ((None, "0"), ("3,1", "3")):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        who = Contestant(path=str(tmp_path), same_weights=False, one_gpu=True)
        assert contest.run("tells", who, tmp_path / "log") == {"sees": sees}
