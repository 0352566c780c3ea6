"""The benchmark of a decode step's attention runs without a GPU, is told on the page, and times no wrong kernel."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import paged_attention
from benchmarks.tables import kernels


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where it writes to, its model a tiny one."""
    monkeypatch.setattr(paged_attention, "MODELS", {"tiny": (4, 2, 16, 2)})
    monkeypatch.setattr(paged_attention, "LENGTHS", (20,))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["paged_attention", "--rounds", "2", "--out", str(tmp_path / "paged_attention")])
    return tmp_path


def test_it_writes_what_the_page_tells(tiny: Path) -> None:
    paged_attention.main()
    path = tiny / "paged_attention.json"
    assert path.with_suffix(".png").stat().st_size > 0
    data = json.loads(path.read_text())
    (row,) = data["results"]
    row["timings"] = {"trl_turbo": {"median_us": 5.0}, "vllm": {"median_us": 15.0}}
    data["environment"] |= {"driver": "x", "cuda": "x"}
    path.write_text(json.dumps(data))
    assert "| tiny | 8 x 20 | 5.0 | 15.0 (3.00x) |".replace("8 x", f"{paged_attention.ROWS} x") in (
        kernels.paged_attention(tiny)
    )


def test_a_wrong_kernel_is_not_timed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = paged_attention.paged_decode

    def wrong(*args: object, **words: object) -> torch.Tensor:
        result: torch.Tensor = right(*args, **words)  # type: ignore[arg-type]
        result[-1, -1] += 1
        return result

    monkeypatch.setattr(paged_attention, "paged_decode", wrong)
    with pytest.raises(SystemExit, match="Wrong results are not timed: off by"):
        paged_attention.main()
    assert not (tiny / "paged_attention.json").exists()
