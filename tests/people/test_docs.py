"""The documentation: every code block runs, the site builds strictly, and what it quotes and counts is so."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
from transformers import TrainingArguments

import trl_turbo

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
RUN = ("python", "bash")
#: Fences that are no code: output, formulas, layouts, and what is put into a pyproject.toml.
NOT_RUN = ("text", "toml")
MODEL = "Qwen/Qwen2.5-1.5B-Instruct"
TRAIN = """
import argparse
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--max_steps", type=int, default=2)
args = parser.parse_args()
trainer = GRPOTrainer(
    model="MODEL",
    reward_funcs=lambda completions, **kwargs: [-len(completion) / 100 for completion in completions],
    train_dataset=Dataset.from_dict({"prompt": ["Name a colour: ", "Name a number: "]}),
    args=GRPOConfig(
        output_dir="outputs", max_steps=args.max_steps, num_generations=4, per_device_train_batch_size=4,
        max_completion_length=16, logging_steps=1, use_cpu=True, report_to="none",
    ),
)
trainer.train()
"""


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of somebody who follows a page: a script, and the model that pages name, a tiny one, beside it."""
    from trl_turbo.demo.tiny import make_model, make_tokenizer, save

    tokenizer = make_tokenizer()
    # A folder of that name is taken before the Hub is
    save(tmp_path / MODEL, make_model(tokenizer, hidden_size=64), tokenizer)
    (tmp_path / "train.py").write_text(TRAIN.replace("MODEL", MODEL))
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, module in (("trl-turbo", "trl_turbo.cli"), ("accelerate", "accelerate.commands.accelerate_cli")):
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (bin_folder / name).chmod(0o755)
    (bin_folder / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    # Scripts of pages are for a GPU: TRL's configurations train in bf16 there and refuse to where there is none
    own = TrainingArguments.__post_init__

    def on_the_cpu(self: TrainingArguments) -> None:
        self.use_cpu = True
        own(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_the_cpu)
    return tmp_path


def parse(page: Path, *, evaluate_bash: Any = None) -> Any:
    sybil = pytest.importorskip("sybil", reason="sybil, which finds the code blocks, is not installed")
    from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

    parsers = [SkipParser(), PythonCodeBlockParser(), CodeBlockParser("bash", evaluate_bash or bash)]
    return sybil.Sybil(parsers=parsers, path=str(page.parent)).parse(page)


def bash(example: Any) -> None:
    command = ["bash", "-euo", "pipefail", "-c", example.parsed]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{example.parsed}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def named(page: Path) -> str:
    return page.stem.lower()


@pytest.mark.trl
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_code_block_runs(page: Path, reader: Path) -> None:
    document = parse(page)
    document.namespace.update(has_vllm=importlib.util.find_spec("vllm") is not None)
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest as skipped:
            reason = str(skipped)
            assert len(reason) > 10, f"{page.name}:{example.line} is skipped without a reason"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_says_what_it_is(page: Path) -> None:
    """A fence without a language, or indented code, would be code that nothing runs."""
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    opening = fences[::2]
    assert all(not closing for closing in fences[1::2])
    assert set(opening) <= {*RUN, *NOT_RUN}, f"{page.name} has blocks of {set(opening) - {*RUN, *NOT_RUN}}"
    examples = [example for example in parse(page).examples() if isinstance(example.parsed, str)]
    assert len(examples) == sum(language in RUN for language in opening)


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in DOCS.glob("*.md"):
        folder = tmp_path / "site" if page.stem == "index" else tmp_path / "site" / page.stem
        assert (folder / "index.html").exists()
    assert (tmp_path / "site" / "results" / "linear_logprob.png").exists()
    shown = (tmp_path / "site" / "benchmarks" / "index.html").read_text()
    assert "results/linear_logprob.png" in shown


def messages(root: Path) -> str:
    """Every string of a package, one a line, with `…` in the place of what varies."""
    found = []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"\{[^{}]*\}", "…", node.value))
    return "\n".join(found)


def quoted() -> list[tuple[str, str]]:
    """Each heading of the page of error messages, with the section that it is in."""
    section, found = "", []
    for line in (DOCS / "troubleshooting.md").read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif match := re.fullmatch(r"### `(.+)`", line):
            found.append((section, match[1]))
    return found


@pytest.fixture(scope="module")
def ours() -> str:
    return messages(ROOT / "trl_turbo")


@pytest.mark.parametrize(("section", "heading"), quoted(), ids=lambda part: part[:40])
def test_messages_are_quoted_as_they_are(section: str, heading: str, ours: str) -> None:
    text = ours
    if section == "From TRL":
        if heading == "CUDA out of memory":  # torch's, and written in C++
            return
        spec = importlib.util.find_spec("trl")
        text = messages(Path(str(spec.submodule_search_locations[0])) / "trainer")
    parts = [re.escape(part) for part in heading.split("…")]
    assert re.search(".*".join(parts), text), f"nothing says {heading!r}"


def test_the_page_of_messages_has_some_of_each_part() -> None:
    sections = {section for section, _ in quoted()}
    assert len(sections) >= 6
    assert len(quoted()) >= 20


def test_names_on_the_page_for_unsloth_exist() -> None:
    page = (DOCS / "unsloth.md").read_text()
    names = set(re.findall(r"trl_turbo\.(\w+)", page))
    assert names >= {"patch", "from_pretrained", "save_lora", "load_lora", "save_pretrained_merged"}
    for name in names:
        assert callable(getattr(trl_turbo, name)), name


def test_every_feature_and_guard_has_its_place() -> None:
    from trl_turbo import settings
    from trl_turbo._features import OPT_IN
    from trl_turbo.patches import FEATURES

    patches, guards = (DOCS / "patches.md").read_text(), (DOCS / "guards.md").read_text()
    off = re.search(
        r"^Off by default until (?:it is|they are) measured on a GPU: (.+)\. All others are on\.$", patches, re.M
    )
    assert set(re.findall(r"`(\w+)`", off[1])) == set(OPT_IN)
    assert not [feature for feature in FEATURES if f"`{feature}`" not in patches]
    assert not [guard for guard in settings.GUARDS if f"`guard_{guard}`" not in guards]


@pytest.mark.trl
@pytest.mark.slow
def test_the_matrix_is_that_of_the_tests() -> None:
    from trl_turbo.compat.versions import unmet

    if unmet(("trl>=1.16",)) is not None:
        pytest.skip("written with TRL 1.16, whose loss types and options are not those of others")
    command = [sys.executable, "-m", "tests.coverage_matrix"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (DOCS / "coverage.md").read_text() == done.stdout, "write it anew: python -m tests.coverage_matrix"
