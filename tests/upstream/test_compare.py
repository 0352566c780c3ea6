"""The comparison itself, on a checkout with one test that patching changes and one that it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.upstream import compare

CASES = """
import pytest


def test_same():
    assert True


def test_fails_either_way():
    assert False


@pytest.mark.skip(reason="not here")
def test_skipped():
    pass


def test_only_stock():
    import trl_turbo

    assert not trl_turbo.status().rows
"""


def test_a_test_that_patching_changes_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    assert compare.main([str(tmp_path), "test_cases.py"]) == 1
    printed = capfd.readouterr().out
    assert "4 tests stock {'failed': 1, 'passed': 2, 'skipped': 1}; 1 differ patched" in printed
    assert "test_cases::test_only_stock: passed stock, failed patched" in printed


def test_the_same_outcomes_pass(tmp_path: Path) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    assert compare.main([str(tmp_path), "test_cases.py", "-k", "not only_stock"]) == 0


# As TRL's: in a package called `tests`, which is also the name of ours
UPSTREAM = """
import sys

import pytest
from datasets import load_dataset

from trl import RLOOConfig, RLOOTrainer

from .testing_utils import NAME


def test_names_of_a_hub(tmp_path):
    config = RLOOConfig(
        output_dir=str(tmp_path), max_steps=2, max_completion_length=8, num_generations=2, report_to="none",
        per_device_train_batch_size=4,
    )
    RLOOTrainer(
        model=NAME,
        reward_funcs="trl-internal-testing/tiny-Qwen2ForSequenceClassification-2.5",
        args=config,
        train_dataset=load_dataset("trl-internal-testing/zen", "conversational_prompt_only", split="train"),
    ).train()


def test_preferences():
    rows = load_dataset("trl-internal-testing/zen", "standard_implicit_prompt_preference")
    assert set(rows["test"].column_names) == {"chosen", "rejected"}
    with pytest.raises(FileNotFoundError, match="stand-in"):
        load_dataset("trl-lib/other")


def test_only_stock():
    assert "trl_turbo" not in sys.modules
"""


@pytest.mark.trl
def test_stand_ins_for_a_hub(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_TURBO_ROLLOUT", "0")
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "testing_utils.py").write_text('NAME = "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5"\n')
    # The names of models are read off the files of the trainers
    (folder / "test_rloo_trainer.py").write_text(UPSTREAM + '# "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5"\n')
    assert compare.main([str(tmp_path), "--stand-ins"]) == 1
    printed = capfd.readouterr().out
    assert "3 tests stock {'passed': 3}; 1 differ patched" in printed
    assert "test_only_stock: passed stock, failed patched" in printed


def test_no_checkout_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="a clone of TRL is needed"):
        compare.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="has none of tests/test_grpo"):
        compare.main([str(tmp_path)])
