"""The page of benchmarks quotes the committed JSON, and nothing else."""

from __future__ import annotations

import json

import pytest

from benchmarks import tables


def test_page_is_what_the_json_says() -> None:
    assert tables.main(["--check"]) == 0


def test_a_number_changed_by_hand_is_found() -> None:
    page = tables.PAGE.read_text()
    data = json.loads((tables.RESULTS / "linear_logprob.json").read_text())
    ours = data["results"][0]["timings"]["trl_turbo"]["median_ms"]
    assert f"| {ours:.1f} (" in page
    assert tables.rendered(page.replace(f"| {ours:.1f} (", "| 1.0 (", 1)) == page


def test_missing_markers_are_said_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="has no section between"):
        tables.rendered("# Benchmarks\n")


def test_bars_of_the_kernel_hold_in_the_committed_run() -> None:
    for row in json.loads((tables.RESULTS / "linear_logprob.json").read_text())["results"]:
        ours = row["timings"]["trl_turbo"]
        for name in tables.JUDGED:
            peer = row["timings"].get(name)
            if peer is None:
                continue
            assert peer["median_ms"] >= row["bar"] * ours["median_ms"], (row["case"], row["n"], row["h"], name)
            if row["case"] == "frozen":
                assert ours["extra_mib"] <= peer["extra_mib"], (row["n"], row["h"], name)
        assert max(row["excess_error"].values()) <= 1
