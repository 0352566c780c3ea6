"""The verdict on a reward curve can fail, and the drawing shows the curve."""

import random
import statistics
from pathlib import Path

import pytest

from trl_turbo.demo.curve import draw_png, draw_text, judge, smooth


def noisy(slope: float, *, steps: int = 200, seed: int = 0) -> list[float]:
    chance = random.Random(seed)
    return [0.3 + slope * i / steps + chance.gauss(0, 0.05) for i in range(steps)]


def test_a_rise_is_visible() -> None:
    rise = judge(noisy(0.3))
    assert rise.visible
    assert rise.steps == 20
    assert rise.last - rise.first == pytest.approx(0.27, abs=4 * rise.standard_error)


@pytest.mark.parametrize("slope", [0.0, -0.3])
def test_no_rise_is_not_visible(slope: float) -> None:
    assert not judge(noisy(slope)).visible


def test_noise_alone_seldom_passes() -> None:
    # One-sided at three standard errors of 20 steps each; ten of a thousand is far above the expected three.
    assert sum(judge(noisy(0.0, seed=seed)).visible for seed in range(1000)) <= 10


def test_standard_error_is_welchs() -> None:
    rewards = noisy(0.1)
    expected = (statistics.variance(rewards[:20]) / 20 + statistics.variance(rewards[-20:]) / 20) ** 0.5
    assert judge(rewards).standard_error == pytest.approx(expected)


def test_constant_curve_has_not_risen() -> None:
    assert not judge([0.5] * 50).visible


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_too_few_steps_is_one_sentence(steps: int) -> None:
    with pytest.raises(
        ValueError, match=f"^{steps} steps are too few to tell a rise from noise: train for 6 or more.$"
    ):
        judge([0.5] * steps)


def test_smooth_is_a_trailing_mean() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert smooth([], 3) == []


def dots(line: str) -> int:
    return sum((ord(character) - 0x2800).bit_count() for character in line if 0x2800 <= ord(character) <= 0x28FF)


def test_text_curve_rises_from_the_lower_left_to_the_upper_right() -> None:
    lines = draw_text([i / 99 for i in range(100)], width=20, height=5).splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("  1.00 ┤")
    assert lines[4].startswith("  0.00 ┤")
    left = [dots(line[8:12]) for line in lines[:5]]
    right = [dots(line[24:28]) for line in lines[:5]]
    assert left[4] > 0
    assert sum(left[:4]) == 0
    assert right[0] > 0
    assert sum(right[1:]) == 0
    assert lines[6].rstrip().endswith("100")


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.0, 1.0]])
def test_text_curve_of_few_values(values: list[float]) -> None:
    assert dots(draw_text(values, width=10, height=3)) > 0


def test_text_curve_of_nothing_is_nothing() -> None:
    assert draw_text([]) == ""


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "reward.png"
    assert draw_png(noisy(0.3), path, title="t")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert not draw_png([0.0, 1.0], tmp_path / "reward.png")
    assert not (tmp_path / "reward.png").exists()
