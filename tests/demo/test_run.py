"""The demo as a whole, small: its files, its verdict, its table."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from trl_turbo.demo import measure as measuring
from trl_turbo.demo import run as running
from trl_turbo.demo.run import Options, run


@pytest.fixture
def no_leftovers(monkeypatch: pytest.MonkeyPatch):
    """The demo is a program of its own: it patches and sets the environment for good."""
    for name in (
        "HF_HUB_OFFLINE",
        "TOKENIZERS_PARALLELISM",
        "OMP_NUM_THREADS",
        "TRANSFORMERS_VERBOSITY",
        "TQDM_MININTERVAL",
    ):
        monkeypatch.setenv(name, "1" if name != "TRANSFORMERS_VERBOSITY" else "error")
    yield
    import trl_turbo

    trl_turbo.unpatch()


@pytest.mark.slow
@pytest.mark.trl
def test_small_demo(tmp_path: Path, no_leftovers: None) -> None:
    console = Console(file=io.StringIO(), width=160)
    rose = run(Options(out=tmp_path, steps=6, compare=False), console)
    summary = json.loads((tmp_path / "demo.json").read_text())
    assert len(summary["rewards"]) == 6
    assert summary["rose"] is rose
    assert (tmp_path / "reward.png").exists()
    text = console.file.getvalue()
    assert "reward 0." in text
    assert "applied  logprob.grpo" in text
    assert ("did not rise" in text) is not rose


@pytest.mark.parametrize("stock", [False, True])
def test_stock_trains_without_patching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stock: bool) -> None:
    import trl_turbo

    patched, ran = [], []
    monkeypatch.setattr(trl_turbo, "patch", lambda: patched.append(True))
    monkeypatch.setattr(measuring, "run_script", lambda script, arguments: ran.append(list(arguments)))
    running.train(tmp_path / "model", Options(out=tmp_path, steps=7, stock=stock), Console(file=io.StringIO()))
    assert bool(patched) is not stock
    assert ran[0][ran[0].index("--max_steps") + 1] == "7"


@pytest.mark.slow
@pytest.mark.trl
def test_comparison_shows_the_same_mathematics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WIDE_VOCABULARY", 2048)
    monkeypatch.setattr(running, "WIDE_LENGTH", 8)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    console = Console(file=io.StringIO(), width=160)
    found = running.compare(Options(out=tmp_path), console)
    assert set(found) == {"stock", "patched"}
    stock, patched = found["stock"], found["patched"]
    assert stock["grad_norms"] == pytest.approx(patched["grad_norms"], rel=1e-4)
    assert stock["grad_norms"][0] > 0
    assert stock["step_s"] > 0
    assert stock["peak_bytes"] > 2048 * 128 * 4  # the embedding alone
    assert "MiB" in console.file.getvalue()


def test_a_measurement_that_fails_names_its_log(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise ValueError('this and that')\n")
    with pytest.raises(
        RuntimeError, match=r"the stock measurement failed with 'ValueError: this and that': see .*\.log"
    ):
        measuring.measure(script, [], output_dir=tmp_path / "out", patched=False)
    assert "this and that" in (tmp_path / "out" / "measurement.log").read_text()


def test_run_script_gives_arguments_and_puts_them_back(tmp_path: Path) -> None:
    import sys

    script = tmp_path / "script.py"
    script.write_text("import sys\nseen = sys.argv[1:]\nname = __name__\n")
    before = list(sys.argv)
    found = measuring.run_script(script, ["--a", "1"])
    assert found["seen"] == ["--a", "1"]
    assert found["name"] == "__main__"
    assert sys.argv == before


def test_a_measured_process_is_no_rank_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL leaves these set once it has started a colocated vLLM, and their port is taken."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nraise ValueError(sorted({'RANK', 'WORLD_SIZE', 'MASTER_PORT'} & os.environ.keys()))\n"
    )
    with pytest.raises(RuntimeError, match=r"ValueError: \[\]"):
        measuring.measure(script, [], output_dir=tmp_path / "out", patched=False)
