"""`trl-turbo doctor`: what it finds on this machine, and its exit code."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def doctor(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trl_turbo.cli", "doctor", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160", **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)


def needs_requests() -> bool:
    """TRL 1.12 imports it in OnlineDPO without requiring it."""
    from trl_turbo.compat.versions import unmet

    return unmet(("trl>=1.12,<1.13",)) is None and find_spec("requests") is None


@pytest.mark.slow
def test_says_what_is_patched_unused_and_to_install() -> None:
    done = doctor("--json")
    found = json.loads(done.stdout)
    assert found["versions"]["trl"]
    assert found["devices"] == []
    rows = {row["name"]: row["status"] for row in found["rows"]}
    assert rows["logprob.grpo"] == rows["logprob.dpo"] == rows["dashboard.trainer"] == "applied"
    from trl_turbo._features import OPT_IN

    for feature, reason in OPT_IN.items():
        assert f"{feature}: {reason}" in found["unused"]
    assert any(line.startswith("no GPU is seen") for line in found["unused"])
    for module, extra in (("vllm", "vllm"), ("bitsandbytes", "quantization"), ("matplotlib", "plot")):
        asked = any(f"pip install 'trl-turbo[{extra}]'" in line for line in found["install"])
        assert asked == (find_spec(module) is None), module
    if needs_requests():
        assert done.returncode == 1
        assert "pip install requests" in found["install"]
        assert "cannot be imported here" in found["problems"][0]
    else:
        assert (found["problems"], done.returncode) == ([], 0)


@pytest.mark.slow
def test_off_for_everything_is_a_problem_and_a_switch_is_none() -> None:
    done = doctor("--json", TRL_TURBO="0")
    assert done.returncode == 1
    assert json.loads(done.stdout)["problems"] == [
        "nothing is patched: TRL_TURBO=0 in the environment turns everything off"
    ]


def test_a_page_for_people() -> None:
    from rich.console import Console

    from trl_turbo.cli.diagnosis import Device, Diagnosis, show

    found = Diagnosis(
        versions={"trl": "1.16.0", "vllm": None},
        devices=[Device("NVIDIA H100", 80 << 30, (9, 0))],
        rows=rows(("a.x", "skipped", "moved"), ("b.y", "applied", "")),
        unused=["one thing"],
        install=["pip install 'trl-turbo[vllm]'"],
        problems=["a.x is skipped: moved"],
    )
    out = io.StringIO()
    show(found, Console(file=out, width=160))
    page = out.getvalue()
    for title in ("Versions", "GPU", "Patches", "Unused", "To install", "Problems"):
        assert f"{title} ─" in page
    for line in ("trl 1.16.0", "not installed: vllm", "NVIDIA H100, 80.0 GiB, compute capability 9.0", "moved"):
        assert line in page
    assert "pip install 'trl-turbo[vllm]'" in page, "and nothing takes the brackets for markup"


def rows(*states: tuple[str, str, str]) -> list[Any]:
    from trl_turbo.report import Row, Status

    return [Row(name, name.partition(".")[0], Status(status), reason, "a.module") for name, status, reason in states]


def test_each_kind_of_trouble_has_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl_turbo.cli import diagnosis as module

    found = module.Diagnosis(rows=rows(("a.x", "skipped", "moved"), ("b.y", "applied", ""), ("c.z", "pending", "")))
    error = ModuleNotFoundError("No module named 'requests'", name="requests")
    monkeypatch.setattr(module, "_out_of_range", lambda: ["trl_turbo is out of its range: it needs trl<2, and ..."])
    module._judge(found, {"c.z": error})
    assert found.problems == [
        "a.x is skipped: moved",
        "c.z cannot be patched, since a.module cannot be imported here: No module named 'requests'",
        "trl_turbo is out of its range: it needs trl<2, and ...",
    ]
    assert found.install == ["pip install requests"]


def test_a_gpu_with_fp8_and_a_second_one_are_told() -> None:
    from trl_turbo.cli.diagnosis import Device, Diagnosis, _suggest

    one = Device("NVIDIA H200", 141 << 30, (9, 0))
    found = Diagnosis(devices=[one, one], rows=rows(("lora.a", "off", "off by default")))
    _suggest(found)
    assert found.unused[0] == "lora: off by default"
    assert "patch(rollout_kv_cache_dtype='fp8')" in found.unused[1]
    assert found.unused[2] == "2 GPUs: start the script with `accelerate launch`"
    older = Diagnosis(devices=[Device("NVIDIA A100", 80 << 30, (8, 0))], rows=rows(("lora.a", "applied", "")))
    _suggest(older)
    assert older.unused == []
