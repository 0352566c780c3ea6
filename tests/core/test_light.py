"""``import trl_turbo`` and ``patch()`` are light: neither imports torch or trl."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import trl_turbo

HEAVY = ("torch", "trl", "transformers", "peft", "accelerate", "triton", "numpy", "vllm")


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    # The parent of the package, so that what is tested here is what runs there, installed or not.
    root = str(Path(trl_turbo.__file__).parents[1])
    code = f"import sys; sys.path.append({root!r})\n{code}"
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    "code",
    [
        "import trl_turbo",
        "import trl_turbo; trl_turbo.hookimpl; trl_turbo.PatchError",
        "import trl_turbo; trl_turbo.patch(); trl_turbo.status(); trl_turbo.unpatch()",
        "import trl_turbo.patching, trl_turbo.report, trl_turbo.compat.versions",
    ],
)
def test_nothing_heavy_is_imported(code):
    done = run(f"{code}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])")
    assert done.stdout.strip() == "", f"{code} imports {done.stdout}"


def test_import_takes_well_under_100_ms():
    took = []
    for _ in range(5):
        done = run("import trl_turbo", "-X", "importtime")
        match = re.search(r"\|\s*(\d+) \| trl_turbo$", done.stderr, re.MULTILINE)
        took.append(int(match[1]) / 1000)
    assert min(took) < 50, f"import trl_turbo took {took} ms"


def test_public_names():
    assert set(trl_turbo.__all__) <= set(dir(trl_turbo))
    for name in trl_turbo.__all__:
        assert getattr(trl_turbo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trl_turbo.nothing  # noqa: B018


def test_version_is_that_of_the_package():
    pyproject = Path(trl_turbo.__file__).parents[1] / "pyproject.toml"
    if pyproject.exists():
        found = re.search(r'^version = "(.+)"$', pyproject.read_text(), re.MULTILINE)[1]
    else:
        from importlib import metadata

        found = metadata.version("trl-turbo")
    assert trl_turbo.__version__ == found
