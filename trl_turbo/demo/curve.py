"""Judge a reward curve and draw it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# How many standard errors count as a rise: chance passes about one run in a thousand.
ENOUGH = 3.0
# Braille cells hold 2 x 4 dots; the bit of each dot by column and row, from U+2800.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


@dataclass(frozen=True)
class Rise:
    """The mean reward of the first and of the last `steps` steps, with the standard error of their difference."""

    first: float
    last: float
    standard_error: float
    steps: int

    @property
    def visible(self) -> bool:
        """Whether the rise exceeds what chance alone would show."""
        return self.last - self.first > ENOUGH * self.standard_error

    def __str__(self) -> str:
        return (
            f"reward {self.first:.3f} -> {self.last:.3f} (means of the first and last {self.steps} steps; "
            f"difference {self.last - self.first:+.3f}, standard error {self.standard_error:.3f})"
        )


def judge(rewards: Sequence[float]) -> Rise:
    """Compare the two ends of a curve, a tenth of it each (Welch's standard error).

    Raises:
        ValueError: There are too few steps to tell a rise from noise.
    """
    steps = max(3, len(rewards) // 10)
    if len(rewards) < 2 * steps:
        raise ValueError(f"{len(rewards)} steps are too few to tell a rise from noise: train for 6 or more.")
    first, last = rewards[:steps], rewards[-steps:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / steps)
    return Rise(statistics.fmean(first), statistics.fmean(last), error, steps)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the up to `window - 1` before it."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def draw_text(values: Sequence[float], *, width: int = 60, height: int = 10) -> str:
    """The curve in braille dots, with its range at the left."""
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    columns, rows = 2 * width, 4 * height
    cells = [[0] * width for _ in range(height)]
    heights = []
    for x in range(columns):
        # Linear between the two nearest steps, so that short and long runs both fill the width.
        position = x * (len(values) - 1) / max(1, columns - 1)
        i = min(int(position), max(0, len(values) - 2))
        following = values[min(i + 1, len(values) - 1)]
        value = values[i] + (following - values[i]) * (position - i)
        heights.append(round((value - low) / span * (rows - 1)))
    for x, y in enumerate(heights):
        previous = heights[x - 1] if x else y
        # A steep piece is filled downwards or upwards, or the line would break into dots.
        for dot in range(min(previous, y), max(previous, y) + 1) if abs(previous - y) > 1 else (y,):
            row = rows - 1 - dot
            cells[row // 4][x // 2] |= DOTS[x % 2][row % 4]
    labels = [f"{high:.2f}", *[""] * (height - 2), f"{low:.2f}"]
    lines = [
        f"{label:>6} ┤{''.join(chr(0x2800 + cell) for cell in row)}" for label, row in zip(labels, cells, strict=True)
    ]
    ends = f"step 1{len(values):>{width - 6}}"
    return "\n".join([*lines, f"{'':>6} └{'─' * width}", f"{'':>8}{ends}"])


def draw_png(rewards: Sequence[float], path: Path, *, window: int = 10, title: str = "") -> bool:
    """Write the curve as a picture; returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    # A Figure of its own: pyplot would pick a backend and keep it for the whole process.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(rewards) + 1)
    axes.plot(steps, rewards, linewidth=0.8, alpha=0.35, label="each step")
    axes.plot(steps, smooth(rewards, window), linewidth=2, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="share of right answers", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return True
