"""The model of a step on several ranks, and what ranks tell of themselves, by two real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ranks, scaling

LINK = scaling.Link(latency_s=1e-3, bytes_s=1e9)


def test_one_rank_exchanges_nothing() -> None:
    assert scaling.ddp_step_s(2.0, 1, 1e9, LINK, waits_s=1.0) == 2.0


def test_what_each_rank_adds() -> None:
    # Small gradients: all of them wait for backward; two ranks send each byte once
    assert scaling.ddp_step_s(2.0, 2, 1e6, LINK) == pytest.approx(2.0 + 1e-3 + 1e-3)
    # Large ones: one bucket waits, however many there are
    assert scaling.ddp_step_s(2.0, 2, 1e12, LINK) == scaling.ddp_step_s(2.0, 2, 1e10, LINK)
    assert scaling.ddp_step_s(2.0, 8, 1e6, LINK, waits_s=0.5) == pytest.approx(2.5 + 1e-3 + 2 * 7 / 8 * 1e-3)


def test_ranks_wait_for_the_slowest_of_each_step() -> None:
    assert scaling.wait_s([[1.0, 3.0], [2.0, 1.0]]) == pytest.approx((0.5 + 1.0) / 2)
    assert scaling.wait_s([[1.0, 2.0]]) == 0


def test_two_processes_tell_of_themselves(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
import json, os, sys, torch
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from benchmarks import ranks
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
ranks.LARGE_BYTES = 1 << 20
model = torch.nn.Linear(4, 4, bias=False)
model.requires_grad_(rank >= 0)
mine = dict.fromkeys(ranks.LARGEST, 1.0 + rank) | {{"logp_gap_last": None, "rollouts_s": [rank], "steps_s": [1]}}
found = ranks.together(mine | {{"tokens_s": 10.0}}, model)
if rank == 0:
    print("FOUND " + json.dumps(found), flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (line,) = (line for line in out.splitlines() if line.startswith("FOUND "))
    found = json.loads(line.removeprefix("FOUND "))
    assert (found["peak_gb"], found["step_s"], found["train_s"], found["logp_gap_last"]) == (2.0, 2.0, 0.0, None)
    assert found["tokens_s"] == pytest.approx(2 * 10.0 * 1.0 / 2.0)
    assert [rank["rollouts_s"] for rank in found["ranks"]] == [[0], [1]]
    assert found["gradient_bytes"] == 64
    assert all(speed["latency_s"] > 0 and speed["bytes_s"] > 0 for speed in found["collectives"].values())
    assert set(ranks.LARGEST) <= set(found)


def test_prediction_for_more_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    several = {"collectives": {"all_reduce": {"latency_s": 0.0, "bytes_s": 1e12}}, "gradient_bytes": 1e6}
    several |= {"ranks": [{"rollouts_s": [1.0]}, {"rollouts_s": [1.0]}], "step_s": 2.0, "world": 2}
    results = {"trl_turbo on 1": {"step_s": 2.0}, "trl_turbo on 2": several}
    path = tmp_path / "ranks_ddp.json"
    path.write_text(json.dumps({"ranks": 2, "results": results}))
    monkeypatch.setattr(sys, "argv", ["scaling", str(path), "--ranks", "4", "--link-gbs", "0.001"])
    assert scaling.main() == 0
    # 1.5 MB over 1 MB a second is 1.5 s more
    assert "4 ranks  step   3.500 s    2.29x" in capsys.readouterr().out
    assert scaling.check({"step_s": 2.0}, several)["off_by"] == pytest.approx(0, abs=1e-5)


def test_bus_speed_needs_no_gpu() -> None:
    def collective(x: torch.Tensor) -> float:
        x.add_(1)
        return 2.0 * x.nbytes

    found = ranks.bus_speed(collective, rounds=2)
    assert found["bytes_s"] > 1e6
    assert found["latency_s"] < 1
