"""Each notebook runs from its first cell to its last on the tiny model, and shows what it says it shows."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def run(path: Path, folder: Path) -> Any:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    shutil.copy(path, folder)
    notebook = nbformat.read(folder / path.name, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    return notebook


def texts(notebook: Any, kind: str) -> list[str]:
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {}).get(kind, "")
            found.append(data if isinstance(data, str) else "".join(data))
    return found


def test_there_are_three() -> None:
    assert NAMES == ["dpo", "grpo", "qlora"]


@pytest.mark.trl
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_to_its_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "qlora" and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = run(NOTEBOOKS / f"{name}.ipynb", tmp_path)
    # The dashboard is one output that was renewed, with its charts, as it was at the end
    shown = [text for text in texts(notebook, "text/html") if 'class="last"' in text]
    assert len(shown) == 1
    assert "<svg" in shown[0]
    assert "grad_norm" in shown[0]
    printed = "".join(o["text"] for cell in notebook.cells for o in cell.get("outputs", ()) if "text" in o)
    assert "applied  dashboard.trainer" in printed, "status() shows its table"
    folder = tmp_path / "outputs" / name
    steps = [json.loads(line) for line in (folder / "_trl_turbo" / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("step", 0) for row in steps) == 10
    assert (folder / "merged" / "model.safetensors").exists()
    if name == "grpo":
        assert any('class="samples"' in text for text in texts(notebook, "text/html"))


@pytest.mark.parametrize("name", NAMES)
def test_is_written_for_people(name: str) -> None:
    """No outputs are committed, the model is named in one line, and that line says what else to write."""
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    lines = [line for line in code.splitlines() if re.match(r"MODEL = ", line)]
    assert len(lines) == 1
    assert 'MODEL = "Qwen/' in lines[0].split("#")[1]
