"""The regression check: what is worse is found, what is a peer's is not ours, and nothing in common is no success."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.longest import following

WHOLE: dict[str, Any] = {
    "environment": {"command": "python -m benchmarks.grpo --completion 512 --out a/b", "card": "H"},
    "results": {
        "trl": {"peak_gb": 20.0, "step_s": 2.0, "tokens_s": 3000.0, "steps_s": [2.0, 2.1]},
        "trl_turbo": {"peak_gb": 6.0, "step_s": 1.0, "tokens_s": 4000.0, "plan": {"peak_bytes": 5}},
    },
}
ROWS: dict[str, Any] = {
    "environment": {"command": "python -m benchmarks.kernels.x", "card": "H"},
    "results": [
        {"case": "a", "n": n, "timings": {"trl_turbo": {"median_ms": 1.0, "low_ms": 0.9}, "peft": {"median_ms": 2.0}}}
        for n in (8, 16)
    ],
}


def check(tmp_path: Path, old: Any, new: Any, *more: str) -> int:
    paths = []
    for name, data in (("old", old), ("new", new)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        paths.append(str(path))
    return compare.main([paths[1], "--with", paths[0], *more])


def changed(data: dict[str, Any], *path: Any, by: float) -> dict[str, Any]:
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] *= by
    return data


@pytest.mark.parametrize(
    ("key", "by", "worse"),
    [
        ("peak_gb", 1.05, True),
        ("peak_gb", 1.02, False),
        ("peak_gb", 0.5, False),
        ("step_s", 1.2, True),
        ("step_s", 1.05, False),
        ("tokens_s", 0.8, True),
        ("tokens_s", 1.5, False),
    ],
)
def test_worse_is_told_from_better(key: str, by: float, worse: bool, tmp_path: Path) -> None:
    assert check(tmp_path, WHOLE, changed(WHOLE, "results", "trl_turbo", key, by=by)) == int(worse)


def test_limits_can_be_given(tmp_path: Path) -> None:
    assert check(tmp_path, WHOLE, changed(WHOLE, "results", "trl_turbo", "step_s", by=1.2), "--slower", "0.3") == 0


def test_a_peer_that_got_slower_is_no_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, WHOLE, changed(WHOLE, "results", "trl", "step_s", by=3)) == 0
    assert "peers, in the same two calls" in capsys.readouterr().out


def test_rows_of_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = changed(ROWS, "results", 1, "timings", "trl_turbo", "median_ms", by=1.3)
    slower["results"].reverse()
    assert check(tmp_path, ROWS, slower) == 1
    assert "n 16" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("WORSE"))
    assert check(tmp_path, ROWS, changed(ROWS, "results", 0, "timings", "trl_turbo", "low_ms", by=9)) == 0


def test_a_run_that_fails_now_is_a_regression(tmp_path: Path) -> None:
    broken = copy.deepcopy(WHOLE)
    broken["results"]["trl_turbo"] = {"error": "out of memory"}
    assert check(tmp_path, WHOLE, broken) == 1


def test_nothing_in_common(tmp_path: Path) -> None:
    new = copy.deepcopy(WHOLE)
    new["results"] = {"trl": new["results"]["trl"]}
    assert check(tmp_path, {**WHOLE, "results": {"trl": {}}}, new) == 2
    other = copy.deepcopy(ROWS)
    for row in other["results"]:
        row["case"] = "b"
    with pytest.raises(ValueError, match="no row of the same case"):
        check(tmp_path, ROWS, other)


def test_the_committed_file_is_found_by_command_and_card(tmp_path: Path) -> None:
    (tmp_path / "grpo.json").write_text(json.dumps(WHOLE))
    elsewhere = copy.deepcopy(WHOLE)
    elsewhere["environment"]["command"] = "python -m benchmarks.grpo --completion 512 --out /tmp/new"
    found = compare.committed(elsewhere, tmp_path)
    assert found is not None
    assert found.name == "grpo.json"
    elsewhere["environment"]["card"] = "A"
    assert compare.committed(elsewhere, tmp_path) is None
    elsewhere["environment"] |= {"card": "H", "command": "python -m benchmarks.grpo --completion 4096 --out /tmp/new"}
    assert compare.committed(elsewhere, tmp_path) is None


def test_every_committed_file_agrees_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for path in compare.RESULTS.glob("*.json"):
        assert compare.main([str(path)]) == 0, path
    assert "WORSE" not in capsys.readouterr().out


def probe(completion: int, fits: bool, peak_gb: float = 70.0) -> dict[str, Any]:
    return {"completion": completion, "fits": fits, "peak_gb": peak_gb, "cap_gb": 80.0}


def test_search_for_the_longest() -> None:
    assert following([], 120_000) == 120_000
    assert following([probe(120_000, True)], 120_000) == 126_000
    assert following([probe(120_000, True, 30.0)], 120_000) == 180_000
    assert following([probe(120_000, False)], 120_000) == 96_000
    assert following([probe(120_000, True), probe(140_000, False)], 120_000) == 130_000
    assert following([probe(120_000, True), probe(121_000, False)], 120_000) is None


def test_search_ends_at_what_fits() -> None:
    """Over a device that holds 47,300 tokens."""
    probes: list[dict[str, Any]] = []
    while (length := following(probes, 36_000)) is not None:
        probes.append(probe(length, length <= 47_300, 80.0 * length / 47_300))
        assert len(probes) < 20
    assert max(p["completion"] for p in probes if p["fits"]) == 47_000
