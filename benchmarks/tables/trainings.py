"""Tables of whole steps, of plans and of the longest completions, from the JSON of their benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tables.section import NOT_MEASURED, About, Results, section

STEP_COLUMNS = (
    ("peak_gb", "peak at the driver, GB"),
    ("step_s", "step, s"),
    ("rollout_s", "rollout, s"),
    ("train_s", "training, s"),
    ("tokens_s", "tokens/s"),
)

#: TRL without a fused head, against which the least memory is claimed.
FOUNDING = "trl1.12"


def grpo(folder: Path) -> str:
    """Whole GRPO steps, one table a file; says so where nothing was measured yet."""
    return _contests(folder, "grpo_*.json", STEP_COLUMNS, lambda data: f"{data['shape']} {_words(data['arguments'])}")


def trainers(folder: Path) -> str:
    """Whole steps of other trainers, one table a file; says so where nothing was measured yet."""

    def title(data: dict[str, Any]) -> str:
        return f"{data['trainer']}, {data['shape']} {_words(data['arguments'])}"

    return _contests(folder, "trainer_*.json", STEP_COLUMNS[:2], title)


def distributed(folder: Path) -> str:
    """Whole steps on several GPUs, one table a file; says so where nothing was measured yet."""

    def title(data: dict[str, Any]) -> str:
        return f"{data['way']} on {data['ranks']} GPUs, {data['shape']} {_words(data['arguments'])}"

    lines = [_contests(folder, "ranks_*.json", STEP_COLUMNS, title)]
    for path in sorted(folder.glob("ranks_*.json")):
        data = json.loads(path.read_text())
        for name, found in data["results"].items():
            model = found.get("model")
            if model is not None:
                lines += ["", f"{name}: {model['scaling']:.2f}x the samples of one; step {model['measured_s']:.2f} s,"]
                lines[-1] += f" predicted {model['predicted_s']:.2f} s ({model['off_by']:+.1%})."
        lines += [f"\nMissed in {data['way']}: {sentence}." for sentence in data["missed"]]
    return "\n".join(lines)


def _contests(
    folder: Path, pattern: str, columns: tuple[tuple[str, str], ...], title: Callable[[dict[str, Any]], str]
) -> str:
    files = sorted(folder.glob(pattern))
    if not files:
        return NOT_MEASURED
    lines: list[str] = []
    for path in files:
        data = json.loads(path.read_text())
        about, results = data["environment"], data["results"]
        versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "trl", "vllm", "transformers", "peft"))
        lines += [""] * bool(lines)
        lines += [f"**{title(data)}**; {about['card']}, driver {about['driver']}; {versions}."]
        lines += ["", f"![{path.stem}](../benchmarks/results/{path.stem}.png)", ""]
        lines += [f"| | {' | '.join(label for _, label in columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [_contestant(name, found, columns) for name, found in results.items()]
        lines += _claims(results)
    return "\n".join(lines)


def _contestant(name: str, found: dict[str, Any], columns: tuple[tuple[str, str], ...]) -> str:
    if "error" in found:
        return f"| {name} | {found['error']} |" + " |" * (len(columns) - 1)
    cells = [f"{found[key]:,.4g}" if found.get(key) is not None else "-" for key, _ in columns]
    return f"| {name} | {' | '.join(cells)} |"


def _claims(results: dict[str, dict[str, Any]]) -> list[str]:
    """Ours over each peer, and the founding claim where what it is about was there."""
    good = {name: found for name, found in results.items() if "error" not in found}
    ours = good.pop("trl_turbo", None)
    if ours is None or not good:
        return []
    ratios = [
        f"{ours['peak_gb'] / peer['peak_gb']:.2f}x the memory and {ours['step_s'] / peer['step_s']:.2f}x the time of "
        f"{name}"
        for name, peer in good.items()
    ]
    lines = ["", f"trl_turbo takes {'; '.join(ratios)}."]
    if FOUNDING in good:
        less = 1 - ours["peak_gb"] / good[FOUNDING]["peak_gb"]
        lines += ["", f"Against TRL without a fused head ({FOUNDING}): {less:.0%} less memory; the claim is 80 %."]
    return lines


def _words(arguments: list[str]) -> str:
    return " ".join(word.removeprefix("--") for word in arguments)


@section
def plan(about: About, results: Results) -> str:
    """Predicted and measured memory."""
    phases = ("rollout", "training", "peak")
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, TRL {about['trl']}, "
        f"vLLM {about['vllm']}.",
        "",
        "![plan](../benchmarks/results/plan.png)",
        "",
        f"| | {' | '.join(phases)} |",
        "|---" * (len(phases) + 1) + "|",
    ]
    for row in results:
        cells = [
            f"{row['predicted_gb'][phase]:.2f} / {row['measured_gb'][phase]:.2f} ({row['off_by'][phase]:+.0%})"
            for phase in phases
        ]
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def longest(folder: Path) -> str:
    """The longest completions that were seen to fit; says so where nothing was measured yet."""
    files = sorted(folder.glob("longest_*.json"))
    if not files:
        return NOT_MEASURED
    columns = ("model", "base", "cap, GB", "bar", "longest that fits", "its peak, GB", "a micro-batch, s", "card")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for path in files:
        data = json.loads(path.read_text())
        fits = [probe for probe in data["results"] if probe["fits"]]
        best = max(fits, key=lambda probe: probe["completion"], default=None)
        cells = [data["shape"], "nf4" if data["four_bit"] else "bf16", f"{data['cap_gb']:g}", f"{data['bar']:,}"]
        cells += ["-"] * 3 if best is None else _probe(best)
        lines.append(f"| {' | '.join([*cells, data['environment']['card']])} |")
    return "\n".join(lines)


def _probe(probe: dict[str, Any]) -> list[str]:
    return [f"{probe['completion']:,}", f"{probe['peak_gb']:.1f}", f"{probe['micro_batch_s'][-1]:.1f}"]
