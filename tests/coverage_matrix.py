"""Write docs/coverage.md from the tests' own matrix: `python -m tests.coverage_matrix > docs/coverage.md`.

The tests of whole trainings say what they compare as a `Case`. Here they are started with a recorder in the place of
what trains, so that each hands over its case and ends.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TRAINERS = ("GRPO", "RLOO", "DPO", "OnlineDPO", "PPO")
#: What a test of whole trainings calls with its case.
CHECKS = ("check", "check_kept", "check_against_plain_torch")
WITHOUT_PPO = (1, 13)
OPENING = """# What is covered by tests

Every line stands for whole trainings that are run twice, by stock TRL and patched, from one seed, and compared: losses,
gradients, metrics and weights. With TRL 1.12 they run as by default, on packed rows and with our attention where a
model qualifies; with the other two most run with `packing` and `attention` off, on the padded batches of a model that
does not, and those with them on are in `tests/trainers/test_packing.py` and `test_attention_interface.py`. This page
is written by `python -m tests.coverage_matrix` from the cases of those tests, and a test fails where it is out of
date.
"""
CLOSING = """Models in 4 and 8 bits, and rollouts of GRPO, RLOO, OnlineDPO and PPO from a shared engine, are tested with
bitsandbytes and a real vLLM in `tests/engine`, `tests/kernels/lora` and `tests/trainers/test_lora_layers.py`.
"""


class Recorder:
    """A pytest plugin that takes the cases."""

    def __init__(self) -> None:
        self.cases: dict[int, Any] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [item for item in items if any(hasattr(item.module, name) for name in CHECKS)]
        for module in {item.module for item in kept}:
            for name in CHECKS:
                if hasattr(module, name):
                    setattr(module, name, self.take)
        items[:] = kept

    def take(self, case: Any, *args: Any, **kwargs: Any) -> None:
        self.cases[id(case)] = case
        pytest.skip("recorded")


def cases() -> list[Any]:
    """Every case of tests/trainers, in the order of the files."""
    recorder = Recorder()
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "--no-header", "-m", "not gpu"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main([*options, "--rootdir", str(ROOT), str(ROOT / "tests" / "trainers")], plugins=[recorder])
    return list(recorder.cases.values())


def adapter(case: Any) -> str:
    """What kind of adapter a case trains, in words."""
    if case.peft is None:
        return "none" if case.model is None else "of the script's own model"
    config = case.peft()
    words = [word for name, word in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA")) if getattr(config, name, False)]
    kind = words[0] if words else {"LORA": "LoRA"}.get(str(config.peft_type).rpartition(".")[2], str(config.peft_type))
    if getattr(config, "lora_bias", False) or getattr(config, "bias", "none") != "none":
        kind += " with bias"
    if getattr(config, "lora_dropout", 0):
        kind += " with dropout"
    if "lm_head" in (getattr(config, "target_modules", None) or ()):
        kind += " on the head"
    if getattr(config, "modules_to_save", None):
        kind += " and a saved module"
    return kind


def precision(case: Any) -> str:
    """In which precision a case trains."""
    dtype = str(case.dtype).rpartition(".")[2]
    mixed = next((name for name in ("bf16", "fp16") if case.options.get(name)), None)
    return f"{mixed} autocast" if mixed else dtype


def versions() -> dict[str, str]:
    """The environments that run these tests, and the TRL in each."""
    text = (ROOT / "tox.ini").read_text()
    names = re.findall(r"^\s+(trl\d+): trl==(\S+)$", text, re.MULTILINE)
    return dict(names)


def page() -> str:
    """The whole page."""
    found = cases()
    trls = sorted(versions().values(), key=lambda version: tuple(map(int, version.split("."))))
    lines = [OPENING, "## Trainer and TRL\n", f"| | {' | '.join(trls)} |", f"|---|{':-:|' * len(trls)}"]
    for trainer in TRAINERS:
        cells = ["-" if trainer == "PPO" and is_without_ppo(trl) else "yes" for trl in trls]
        lines.append(f"| {trainer} | {' | '.join(cells)} |")
    lines += ["", "TRL has no PPO since 1.13. An option that a TRL does not have is skipped there.", ""]
    for title, key in (("Trainer and model", lambda case: case.family), ("adapter", adapter), ("precision", precision)):
        lines += table(title if title.startswith("Trainer") else f"Trainer and {title}", found, key)
    return "\n".join([*lines, CLOSING])


def is_without_ppo(trl: str) -> bool:
    return tuple(map(int, trl.split(".")[:2])) >= WITHOUT_PPO


def table(title: str, found: list[Any], key: Any) -> list[str]:
    covered: dict[str, set[str]] = defaultdict(set)
    for case in found:
        covered[key(case)].add(case.trainer)
    lines = [f"## {title}\n", f"| | {' | '.join(TRAINERS)} |", f"|---|{':-:|' * len(TRAINERS)}"]
    for name in sorted(covered):
        cells = ("yes" if trainer in covered[name] else "" for trainer in TRAINERS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.stdout.write(page())
