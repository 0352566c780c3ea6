"""The benchmark of a decode step's layers runs without a GPU, is told on the page, and times no wrong kernel."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import skinny
from benchmarks.tables import kernels


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where it writes to, its model a tiny one."""
    monkeypatch.setattr(skinny, "MODELS", {"tiny": (64, 160)})
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["skinny", "--rounds", "2", "--out", str(tmp_path / "skinny")])
    return tmp_path


def test_it_writes_what_the_page_tells(tiny: Path) -> None:
    skinny.main()
    path = tiny / "skinny.json"
    assert path.with_suffix(".png").stat().st_size > 0
    data = json.loads(path.read_text())
    assert [(row["op"], row["m"], row["bytes"]) for row in data["results"]] == [
        ("gate_up", 8, 2 * 320 * 64),
        ("gate_up", 16, 2 * 320 * 64),
        ("down", 8, 2 * 64 * 160),
        ("down", 16, 2 * 64 * 160),
    ]
    data["environment"] |= {"driver": "x", "cuda": "x"}
    path.write_text(json.dumps(data))
    assert "| tiny | down | 16 | 64 x 160 |" in kernels.skinny(tiny)


def test_a_wrong_kernel_is_not_timed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = skinny.skinny_linear

    def wrong(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return right(x, weight).index_fill_(1, torch.tensor([0], device=x.device), 0.0)

    monkeypatch.setattr(skinny, "skinny_linear", wrong)
    with pytest.raises(SystemExit, match=r"down is [\d.]+ times as far from float64"):
        skinny.main()
    assert not (tiny / "skinny.json").exists()
