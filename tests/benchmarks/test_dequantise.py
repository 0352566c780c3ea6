"""The benchmark of 4-bit weights runs without a GPU, is told on the page, and times no wrong kernel."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes")

from benchmarks.kernels import dequantise
from benchmarks.tables import kernels


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where it writes to, its shape a tiny one."""
    monkeypatch.setattr(dequantise, "SHAPES", ((64, 128),))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["dequantise", "--rounds", "2", "--out", str(tmp_path / "dequantise")])
    return tmp_path


def test_it_writes_what_the_page_tells(tiny: Path) -> None:
    dequantise.main()
    path = tiny / "dequantise.json"
    assert path.with_suffix(".png").stat().st_size > 0
    data = json.loads(path.read_text())
    (row,) = data["results"]
    assert row["bytes"] == 64 * 128 // 2 + 64 * 128 // 64 + 4 + 2 * 64 * 128
    data["environment"] |= {"driver": "x", "cuda": "x"}
    path.write_text(json.dumps(data))
    assert "| 64 x 128 |" in kernels.dequantise(tiny)


def test_a_wrong_kernel_is_not_timed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = dequantise.Dequantiser.__call__

    def wrong(self: dequantise.Dequantiser, out: torch.Tensor) -> torch.Tensor:
        call(self, out)[-1, -1] += 1
        return out

    monkeypatch.setattr(dequantise.Dequantiser, "__call__", wrong)
    with pytest.raises(SystemExit, match="1 of 8192 numbers are not bitsandbytes'"):
        dequantise.main()
    assert not (tiny / "dequantise.json").exists()
