"""The latest completions of a trainer, with each reward."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Within the trainer's `output_dir`. What begins with an underscore stays here when a trainer pushes that to the Hub:
#: prompts and completions are not for everybody.
FOLDER = "_trl_turbo"
FILE = "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        prompt: A text or a chat.
        completion: A text or a chat.
        rewards: What each reward function gave it.
        advantage: What the trainer made of it.
    """

    prompt: Any
    completion: Any
    rewards: dict[str, float | None]
    advantage: float | None


@dataclass(frozen=True)
class Samples:
    """Completions, as a list; it prints as a table, and is shown as one in a notebook."""

    rows: list[Sample] = field(default_factory=list)
    step: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.rows[index]

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        names = list(dict.fromkeys(name for row in self.rows for name in row.rewards))
        table = Table("prompt", "completion", *names, "advantage", title=f"Step {self.step}", show_lines=True)
        for row in self.rows:
            numbers = [*(row.rewards.get(name) for name in names), row.advantage]
            shown = ["" if number is None else f"{number:.3g}" for number in numbers]
            table.add_row(Text(text_of(row.prompt)), Text(text_of(row.completion)), *shown)
        return table

    def __str__(self) -> str:
        import io

        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=120).print(self)
        return out.getvalue()

    def _repr_html_(self) -> str:
        from trl_turbo.dashboard.html import samples_html

        return samples_html(self)


def samples(trainer: Any, n: int = 8) -> Samples:
    """Return the completions that a trainer sampled last.

    Args:
        trainer: A GRPO or RLOO trainer, or another that keeps what it logs of its completions.
        n: How many, the latest ones; TRL keeps one generation batch.

    Raises:
        TypeError: The trainer samples nothing, or keeps nothing of it.
    """
    logs = getattr(trainer, "_logs", None)
    if not isinstance(logs, dict) or "completion" not in logs:
        raise TypeError(
            f"{type(trainer).__name__} keeps no completions; samples() shows those of GRPO and RLOO trainers"
        )
    prompts, completions = list(logs["prompt"]), list(logs["completion"])
    rewards = {name: list(values) for name, values in logs.get("rewards", {}).items()}
    advantages = list(logs.get("advantages", ()))
    first = max(0, len(completions) - n)
    rows = [
        Sample(
            prompts[i],
            completions[i],
            {name: _number(values, i) for name, values in rewards.items()},
            _number(advantages, i),
        )
        for i in range(first, len(completions))
    ]
    return Samples(rows, trainer.state.global_step)


def write(found: Samples, folder: Path) -> None:
    """Write them for whoever looks from another terminal."""
    lines = [json.dumps({"step": found.step, **vars(row)}, default=str) for row in found]
    part = folder / f"{FILE}.part"
    part.write_text("\n".join(lines) + "\n")
    part.replace(folder / FILE)  # a reader sees the old file or the new one


def read(folder: Path, n: int = 8) -> Samples:
    """Read what a training wrote into its output folder.

    Raises:
        FileNotFoundError: There is none.
    """
    path = next((path for path in (folder / FOLDER / FILE, folder / FILE) if path.exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"there are no completions in {folder}; name the output_dir of a GRPO or RLOO run that has logged a step "
            "with the dashboard on"
        )
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    step = rows[-1].pop("step") if rows else 0
    return Samples([Sample(**{k: v for k, v in row.items() if k != "step"}) for row in rows][-n:], step)


def text_of(message: Any) -> str:
    """Return a text as it is, and a chat with one line a message."""
    if isinstance(message, list):
        return "\n".join(f"{m.get('role')}: {m.get('content')}" if isinstance(m, dict) else str(m) for m in message)
    return str(message)


def _number(values: list[Any], i: int) -> float | None:
    from trl_turbo.dashboard.record import plain

    found = plain(values[i]) if i < len(values) else None
    return found if isinstance(found, (int, float)) else None
