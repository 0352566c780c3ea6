"""The page of benchmarks quotes the committed JSON, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.tables import kernels, page, trainings


def test_page_is_what_the_json_says() -> None:
    assert page.main(["--check"]) == 0


def test_a_number_changed_by_hand_is_found() -> None:
    text = page.PAGE.read_text()
    data = json.loads((page.RESULTS / "linear_logprob.json").read_text())
    ours = data["results"][0]["timings"]["trl_turbo"]["median_ms"]
    assert f"| {ours:.1f} (" in text
    assert page.rendered(text.replace(f"| {ours:.1f} (", "| 1.0 (", 1)) == text


def test_missing_markers_are_said_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="has no section between"):
        page.rendered("# Benchmarks\n")


def test_bars_of_the_kernel_hold_in_the_committed_run() -> None:
    for row in json.loads((page.RESULTS / "linear_logprob.json").read_text())["results"]:
        ours = row["timings"]["trl_turbo"]
        for name in kernels.JUDGED:
            peer = row["timings"].get(name)
            if peer is None:
                continue
            assert peer["median_ms"] >= row["bar"] * ours["median_ms"], (row["case"], row["n"], row["h"], name)
            if row["case"] == "frozen":
                assert ours["extra_mib"] <= peer["extra_mib"], (row["n"], row["h"], name)
        assert max(row["excess_error"].values()) <= 1


def test_contests_are_told_with_their_claims(tmp_path: Path) -> None:
    for section in page.SECTIONS.values():
        if section is not kernels.linear_logprob:
            assert section(tmp_path) == "Not measured yet."
    about = dict.fromkeys(("card", "driver", "cuda", "torch", "trl", "vllm", "transformers", "peft"), "x")
    results = {
        "trl1.12": {"peak_gb": 80.0, "step_s": 2.0, "rollout_s": 1.0, "train_s": 1.0, "tokens_s": 10.0},
        "unsloth": {"error": "RuntimeError: no"},
        "trl_turbo": {"peak_gb": 8.0, "step_s": 1.0, "rollout_s": 0.5, "train_s": 0.5, "tokens_s": 20.0},
    }
    data = {
        "environment": about,
        "shape": "s",
        "trainer": "dpo",
        "arguments": ["--completion", "9"],
        "results": results,
    }
    for name in ("grpo_a", "trainer_b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    for text in (trainings.grpo(tmp_path), trainings.trainers(tmp_path)):
        assert "0.10x the memory and 0.50x the time of trl1.12" in text
        assert "90% less memory" in text
        assert "| unsloth | RuntimeError: no |" in text
    sizes = dict.fromkeys(("rollout", "training", "peak"), 1.0)
    row = {"case": "c", "predicted_gb": sizes, "measured_gb": sizes, "off_by": dict.fromkeys(sizes, 0.04)}
    (tmp_path / "plan.json").write_text(json.dumps({"environment": about, "results": [row]}))
    assert "| c | 1.00 / 1.00 (+4%) |" in trainings.plan(tmp_path)
    probes = [
        {"completion": n, "fits": n < 3000, "peak_gb": 7.0, "micro_batch_s": [1.0, 2.0]} for n in (1000, 2000, 3000)
    ]
    found = {"environment": about, "shape": "s", "four_bit": True, "cap_gb": 8.0, "bar": 1500, "results": probes}
    (tmp_path / "longest_8gb.json").write_text(json.dumps(found))
    assert "| s | nf4 | 8 | 1,500 | 2,000 | 7.0 | 2.0 | x |" in trainings.longest(tmp_path)
