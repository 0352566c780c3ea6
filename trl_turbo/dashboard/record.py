"""What a trainer logged, in order, and which of it belongs on one chart. Imports neither torch nor trl."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Title of a chart -> the names, as TRL's trainers log them, that it shows. By rule and not by trainer: a trainer of a
#: later TRL, or a user's own, is shown by what it logs.
CHARTS: dict[str, re.Pattern[str]] = {
    "Reward": re.compile(r"reward|rewards/(?!.*/std$).+|objective/(scores|rlhf_reward)"),
    "Loss": re.compile(r"loss|policy_loss|loss/.+"),
    "KL": re.compile(r"kl|objective/kl|policy/approxkl_avg"),
    "Entropy": re.compile(r"entropy|objective/entropy|policy/entropy_avg"),
    "Completion length": re.compile(r"completions/(mean|min|max)_length"),
    "Tokens/s": re.compile(r"tokens_per_second"),
    "Memory, GiB": re.compile(r"memory/.+"),
    "Gradient norm": re.compile(r"grad_norm"),
}
#: Counts of tokens since the start, whichever a trainer has.
COUNTS = ("num_tokens", "num_input_tokens_seen")
_GIB = 1 << 30
# What transformers logs once, at the end: of the run and not of a step
_SUMMARY = "train_runtime"


@dataclass
class Record:
    """The logs of one training.

    Attributes:
        facts: What is true of the whole run, such as the trainer's class.
        rows: One a log: `step`, `time_s`, the trainer's numbers, `tokens_per_second` and `memory/<phase>` in GiB.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    _counted: tuple[float, float] | None = None

    def start(self, time_s: float) -> None:
        """Say when the first step began, for the rate of its tokens."""
        self._counted = (time_s, 0.0)

    def add(
        self, logs: Mapping[str, Any], *, step: int, time_s: float, memory_bytes: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """Keep what was logged, and return it as a row.

        Args:
            logs: As the trainer gives it to its callbacks.
            step: The trainer's global step.
            time_s: Seconds since the training began.
            memory_bytes: Peak of each phase since the last log.
        """
        row: dict[str, Any] = {"step": step, "time_s": round(time_s, 3)}
        row.update({name: plain(value) for name, value in logs.items()})
        rate = self._rate(logs, time_s)
        if rate is not None:
            row["tokens_per_second"] = rate
        for phase, size in (memory_bytes or {}).items():
            row[f"memory/{phase}"] = round(size / _GIB, 4)
        self.rows.append(row)
        return row

    def _rate(self, logs: Mapping[str, Any], time_s: float) -> float | None:
        count = next((logs[name] for name in COUNTS if isinstance(logs.get(name), (int, float))), None)
        if count is None or self._counted is None:
            return None
        before_s, before = self._counted
        self._counted = (time_s, float(count))
        # A run that was resumed counts from where it was: nothing is known of its first log
        first_of_resumed = before == 0 and self.facts.get("resumed_at")
        return None if time_s <= before_s or first_of_resumed else round((count - before) / (time_s - before_s), 1)

    def series(self) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Return, for each chart with anything to show, the points `(step, value)` of each name."""
        charts: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for title, pattern in CHARTS.items():
            for row, name in self._named(pattern):
                charts.setdefault(title, {}).setdefault(name, []).append((row["step"], float(row[name])))
        return charts

    def _named(self, pattern: re.Pattern[str]) -> Iterator[tuple[dict[str, Any], str]]:
        for row in self.rows:
            if _SUMMARY in row:
                continue
            for name, value in row.items():
                if pattern.fullmatch(name.removeprefix("eval_")) and isinstance(value, (int, float)):
                    yield row, name


def plain(value: Any) -> Any:
    """Return a value as JSON has it: what is not finite as `None`, as JSON has no NaN; tensors as numbers."""
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None
