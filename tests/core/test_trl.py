"""On the real TRL, in both import orders, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import trl_turbo

pytestmark = pytest.mark.slow

SETUP = """
import json, sys
sys.path.append({root!r})
from trl_turbo._plan import Sources
from trl_turbo._session import Session
from trl_turbo.hookspecs import hookimpl
from trl_turbo.patching import Patch, Replacement

METHOD = "_get_per_token_logps_and_entropies"

def build(module):
    def wrap(original):
        def replacement(self, *args, **kwargs):
            return "turbo"
        return replacement
    yield Replacement(module.GRPOTrainer, METHOD, wrap)
    yield Replacement(module, "unwrap_model_for_generation", wrap)
    yield Replacement(module.GRPOTrainer, "save_model", wrap)  # inherited

class Plugin:
    @hookimpl
    def turbo_patches(self, env):
        assert "torch" not in sys.modules or "trl" in sys.modules
        return [Patch("demo.grpo", "demo", "trl.trainer.grpo_trainer", "demo", build, requires=("trl>=0.29.1",))]

session = Session(Sources(extra={{"demo": Plugin()}}, entry_points=list))

def patch():
    return session.patch(strict=True, verbose=False, features={{}})["demo.grpo"].status.value

def snapshot():
    module = sys.modules["trl.trainer.grpo_trainer"]
    return [dict(vars(module.GRPOTrainer)), dict(vars(module))]
"""

NAMES = ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]

PATCH_FIRST = """
first = patch()
assert "torch" not in sys.modules and "trl" not in sys.modules
from trl import GRPOTrainer
class Mine(GRPOTrainer): pass
before = None
"""

IMPORT_FIRST = """
from trl import GRPOTrainer
class Mine(GRPOTrainer): pass
before = snapshot()
first = patch()
"""

CHECK = """
import inspect
import trl.trainer.grpo_trainer as module
seen = [getattr(cls, METHOD)(None) for cls in (GRPOTrainer, Mine)]
names = list(inspect.signature(getattr(GRPOTrainer, METHOD)).parameters)[:5]
after = session.status()["demo.grpo"].status.value
session.unpatch()
before = before or snapshot()
stock = not hasattr(getattr(GRPOTrainer, METHOD), "__trl_turbo_route__")
patch(); session.unpatch()
same = all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(before, snapshot()))
print(json.dumps(dict(first=first, seen=seen, names=names, after=after, stock=stock, same=same)))
"""


@pytest.mark.parametrize("order", ["patch", "import"])
def test_grpo_trainer(order):
    code = SETUP.format(root=str(Path(trl_turbo.__file__).parents[1]))
    code += (PATCH_FIRST if order == "patch" else IMPORT_FIRST) + CHECK
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "first": "pending" if order == "patch" else "applied",
        "seen": ["turbo", "turbo"],
        "names": NAMES,
        "after": "applied",
        "stock": True,
        "same": True,
    }
