"""A third-party plugin, built into a wheel, installed and found through its entry points."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trl_turbo

pytestmark = pytest.mark.slow

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "turbo-extras"
version = "3.0"

[project.entry-points.trl_turbo]
broken = "turbo_extras.broken"
extras = "turbo_extras.plugin"
misnamed = "turbo_extras.misnamed"

[tool.hatch.build.targets.wheel]
packages = ["turbo_extras"]
"""

PLUGIN = """
import trl_turbo
from trl_turbo.patching import Patch, Replacement


def build(module):
    def wrap(original):
        def dumps(*args, **kwargs):
            return "turbo " + original(*args, **kwargs)
        return dumps
    return [Replacement(module, "dumps", wrap)]


@trl_turbo.hookimpl
def turbo_patches(env):
    return [
        Patch("extras.json", "extras", "json", "says turbo", build, requires=("turbo-extras>=3",)),
        Patch("extras.other", "extras", "json", "is vetoed", build),
    ]


@trl_turbo.hookimpl
def turbo_veto(patch, env):
    if patch.name in ("extras.other", "logprob.dpo"):
        return "turbo-extras does not want it"
"""

SCRIPT = """
import sys
import trl_turbo
found = trl_turbo.patch()
import json
loud = json.dumps([1])
off = trl_turbo.patch(extras=False)
quiet = json.dumps([1])
trl_turbo.unpatch()
print(json.dumps({"found": found.to_dict(), "off": off.to_dict(), "loud": loud, "quiet": quiet}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin installed from its wheel."""
    root = tmp_path_factory.mktemp("plugin")
    package = root / "project" / "turbo_extras"
    package.mkdir(parents=True)
    (root / "project" / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").write_text("")
    (package / "plugin.py").write_text(PLUGIN)
    (package / "broken.py").write_text("import a_module_that_nobody_has\n")
    (package / "misnamed.py").write_text("import trl_turbo\n@trl_turbo.hookimpl\ndef turbo_veto(patches): ...\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # Where hatchling is in the environment, as in tox, nothing is fetched.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    wheel = [*pip, "wheel", *isolation, "--no-deps", "-w", str(root / "dist"), str(root / "project")]
    subprocess.run(wheel, check=True, timeout=300)
    (built,) = (root / "dist").glob("turbo_extras-3.0-*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(root / "site"), str(built)]
    subprocess.run(install, check=True, timeout=300)
    return root / "site"


def run(site: Path, **environment: str) -> dict:
    paths = [str(site), str(Path(trl_turbo.__file__).parents[1])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows(report: dict) -> dict[str, dict]:
    return {row["name"]: row for row in report["rows"]}


def test_plugin_adds_vetoes_and_breaks_alone(site):
    done = run(site)
    found = rows(done["found"])
    assert found["extras.json"]["status"] in ("applied", "pending"), "json may be imported by then"
    assert found["extras.json"]["source"] == "extras"
    assert (found["extras.other"]["status"], found["extras.other"]["reason"]) == (
        "skipped",
        "turbo-extras does not want it",
    )
    assert found["logprob.dpo"]["reason"] == "turbo-extras does not want it", "a plugin vetoes a built-in patch"
    assert found["logprob.grpo"]["status"] == "pending", "the rest goes on"
    assert found["plugin.broken"]["status"] == "failed"
    assert "a_module_that_nobody_has" in found["plugin.broken"]["reason"]
    assert found["plugin.broken"]["target"] == "turbo_extras.broken"
    assert "its hooks do not fit" in found["plugin.misnamed"]["reason"]
    assert done["loud"] == "turbo [1]"
    assert rows(done["off"])["extras.json"]["status"] == "off"
    assert done["quiet"] == "[1]"


def test_plugins_can_be_left_out(site):
    done = run(site, TRL_TURBO_PLUGINS="0")
    assert not [name for name in rows(done["found"]) if name.startswith(("extras", "plugin"))]
    assert done["loud"] == "[1]"
