"""The `trl-turbo` command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trl_turbo import cli
from trl_turbo.demo import run as running

runner = CliRunner()


def test_version() -> None:
    import trl_turbo

    done = runner.invoke(cli.app, ["--version"])
    assert done.exit_code == 0
    assert done.output == f"trl-turbo {trl_turbo.__version__}\n"


@pytest.mark.parametrize("command", ["demo", "doctor", "plan", "report", "run", "samples"])
def test_help_has_examples(command: str) -> None:
    done = runner.invoke(cli.app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    assert done.exit_code == 0
    assert "Examples" in done.output
    assert f"trl-turbo {command}" in done.output


@pytest.mark.parametrize(("rose", "code"), [(True, 0), (False, 1)])
def test_demo_fails_where_the_reward_did_not_rise(monkeypatch: pytest.MonkeyPatch, rose: bool, code: int) -> None:
    seen = []
    monkeypatch.setattr(running, "run", lambda options, console: seen.append(options) or rose)
    done = runner.invoke(cli.app, ["demo", "--steps", "30", "--seed", "2", "--stock", "--no-compare"])
    assert done.exit_code == code
    assert (seen[0].steps, seen[0].seed, seen[0].stock, seen[0].compare) == (30, 2, True, False)


def test_demo_refuses_too_few_steps() -> None:
    assert runner.invoke(cli.app, ["demo", "--steps", "2"]).exit_code == 2


@pytest.mark.slow
def test_report_says_what_applies_here() -> None:
    command = [sys.executable, "-c", "from trl_turbo.cli import main; main()", "report", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["versions"]["trl"]
    rows = {row["name"]: row["status"] for row in found["rows"]}
    assert rows["logprob.grpo"] == "applied"


def test_help_is_fast_to_come_by() -> None:
    code = "import sys, trl_turbo.cli; print({'torch', 'trl', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    from trl_turbo.demo.tiny import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("config")
    make_model(make_tokenizer()).config.save_pretrained(folder)  # its configuration, and no weights
    return str(folder)


def test_plan_needs_the_configuration_alone(tiny: str) -> None:
    asked = ["plan", tiny, "--trainer", "grpo", "--group", "8", "--completion", "512", "--gpu", "24"]
    done = runner.invoke(cli.app, asked)
    assert done.exit_code == 0, done.output
    assert "rollout" in done.output
    assert "the device has 24.0 GiB: it fits; the longest completion that does:" in done.output
    found = json.loads(runner.invoke(cli.app, [*asked, "--json"]).output)
    assert found["gpu_bytes"] == 24 << 30
    assert found["peak_bytes"] == max(found["totals"].values())
    assert runner.invoke(cli.app, ["plan", tiny, "--gpu", "0.1"]).exit_code == 1, "it does not fit"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["--trainer", "sft"], "there is no plan for the trainer 'sft'; name one of grpo, rloo, dpo, online_dpo, ppo"),
        (["/nowhere/at-all"], "trl-turbo plan: "),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(asked: list[str], sentence: str, tiny: str) -> None:
    done = runner.invoke(cli.app, ["plan", *asked, *([tiny] if asked[0].startswith("--") else [])])
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_samples_of_a_folder(tmp_path: Path) -> None:
    from trl_turbo.dashboard.samples import Sample, Samples, write

    none = runner.invoke(cli.app, ["samples", str(tmp_path)])
    assert none.exit_code == 2
    assert f"there are no completions in {tmp_path}; name the output_dir of a GRPO or RLOO run" in none.stderr
    (tmp_path / "_trl_turbo").mkdir()
    chat = [{"role": "assistant", "content": "nineteen"}]
    write(
        Samples([Sample("12+7=", "18", {"right": 0.0}, -1.0), Sample("12+7=", chat, {"right": 1.0}, 1.0)], 5),
        tmp_path / "_trl_turbo",
    )
    done = runner.invoke(cli.app, ["samples", str(tmp_path), "-n", "1"])
    assert done.exit_code == 0
    assert "Step 5" in done.output
    assert "assistant: nineteen" in done.output
    assert "18" not in done.output


COMPLETIONS = {
    "bash": {"COMP_WORDS": "trl-turbo do", "COMP_CWORD": "1"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "trl-turbo do"},
    "fish": {"_TYPER_COMPLETE_ARGS": "trl-turbo do", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


@pytest.mark.parametrize("shell", COMPLETIONS)
def test_the_shell_completes_commands(shell: str) -> None:
    env = {**os.environ, **COMPLETIONS[shell], "_TRL_TURBO_COMPLETE": f"complete_{shell}"}
    command = [sys.executable, "-m", "trl_turbo.cli"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert "doctor" in done.stdout, done.stderr
    assert "report" not in done.stdout
