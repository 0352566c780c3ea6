"""The `trl-turbo` command."""

import json
import subprocess
import sys

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


@pytest.mark.parametrize("command", ["demo", "report"])
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
