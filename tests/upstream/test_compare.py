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


def test_no_checkout_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="a clone of TRL is needed"):
        compare.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="has none of tests/test_grpo"):
        compare.main([str(tmp_path)])
