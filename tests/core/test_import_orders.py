"""Whatever a script imports first, every patch finds the modules that it needs by the time it applies."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import importlib
import trl_turbo
from trl_turbo.patches import FEATURES

trl_turbo.patch(verbose=False, **dict.fromkeys(FEATURES, True))
importlib.import_module({first!r})
for name in ("grpo", "rloo", "dpo"):
    importlib.import_module(f"trl.trainer.{{name}}_trainer")
rows = [row for row in trl_turbo.status() if row.target.startswith(("trl.trainer", "trl_turbo", "accelerate", "peft"))]
wrong = [f"{{row.name}}: {{row.reason}}" for row in rows if row.status == "failed"]
assert sum(row.status == "applied" for row in rows) > 15, rows
print(wrong)
"""


@pytest.mark.parametrize("first", ["accelerate", "peft", "transformers.modeling_utils"])
def test_every_patch_applies(first: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(first=first)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout
