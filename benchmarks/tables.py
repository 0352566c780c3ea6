"""Write the tables of docs/benchmarks.md from the committed JSON, or check that they are what it says.

python -m benchmarks.tables            writes
python -m benchmarks.tables --check    exits with 1 where the page and the JSON differ
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
CASES = {
    "frozen": "Frozen head, forward and backward (log-probs with gradient, entropies without)",
    "no_grad": "No gradient (log-probs and entropies)",
    "trained": "Trained head, forward and backward",
}
# Peers that give what a trainer needs, a gradient for each token; the bars are against these
JUDGED = ("trl", "liger_none", "liger_grpo")


def linear_logprob() -> str:
    """The section's tables, in Markdown."""
    data = json.loads((RESULTS / "linear_logprob.json").read_text())
    about = data["environment"]
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, triton "
        f"{about['triton']}, TRL {about['trl']}, Liger {about['liger-kernel']}."
    ]
    for case, title in CASES.items():
        rows = [row for row in data["results"] if row["case"] == case]
        names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
        lines += ["", f"{title}; the bar is {rows[0]['bar']}x:", ""]
        lines.append(f"| N | H | {' | '.join(names)} | fastest peer / ours |")
        lines.append("|---" * (len(names) + 3) + "|")
        lines += [_row(row, names) for row in rows]
    return "\n".join(lines)


def _row(row: dict[str, Any], names: list[str]) -> str:
    timings = row["timings"]
    cells = [f"{row['n']:,}", f"{row['h']:,}"]
    for name in names:
        timing = timings.get(name)
        extra = "" if name == "products" or timing is None else f" ({timing['extra_mib']:.0f})"
        cells.append("-" if timing is None else f"{timing['median_ms']:.1f}{extra}")
    fastest = min(timings[name]["median_ms"] for name in JUDGED if name in timings)
    cells.append(f"{fastest / timings['trl_turbo']['median_ms']:.2f}x")
    return f"| {' | '.join(cells)} |"


def lora_fold() -> str:
    """The section's table, in Markdown; says so where nothing was measured yet."""
    path = RESULTS / "lora_fold.json"
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text())
    about, results = data["environment"], data["results"]
    names = list(results[0]["timings"])
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, triton "
        f"{about['triton']}, PEFT {about['peft']}.",
        "",
        "![lora_fold](../benchmarks/results/lora_fold.png)",
        "",
        f"| model | layers | adapter adds | log | fold | restore | {' | '.join(names)} | GB/s (copy) | drift of peft |",
        "|---" * (len(names) + 8) + "|",
    ]
    for row in results:
        cells = [row["model"], str(row["layers"]), f"{row['adapter_share']:.1%}"]
        cells += [f"{row['log_bytes'] / row['weight_bytes']:.2%}", f"{row['fold_ms']:.1f}", f"{row['restore_ms']:.1f}"]
        timings = (row["timings"][name] for name in names)
        cells += [f"{timing['median_ms']:.1f} ({timing['extra_mib']:.0f})" for timing in timings]
        cells += [f"{row['gbps']:,.0f} ({row['copy_gbps']:,.0f})", f"{row['peft_changed'] / row['weights']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def lora() -> str:
    """The section's table, in Markdown; says so where nothing was measured yet."""
    path = RESULTS / "lora.json"
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text())
    about, results = data["environment"], data["results"]
    phases = ("forward", "backward", "both")
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, PEFT "
        f"{about['peft']}, transformers {about['transformers']}, bitsandbytes {about['bitsandbytes']}.",
        "",
        "![lora](../benchmarks/results/lora.png)",
        "",
        f"| block | H | N | rank | base | {' | '.join(f'{phase}, ms' for phase in phases)} | kept, MiB |",
        "|---" * 9 + "|",
    ]
    for row in results:
        cells = [row["block"], f"{row['h']:,}", f"{row['n']:,}", str(row["rank"]), row["base"]]
        for phase in phases:
            ours, peft = (row[phase][name]["median_ms"] for name in ("trl_turbo", "peft"))
            cells.append(f"{ours:.2f} ({peft / ours:.2f}x)")
        kept = row["kept_mib"]
        cells.append(f"{kept['trl_turbo']:,.0f} ({kept['peft']:,.0f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def blocks() -> str:
    """The section's tables, in Markdown; says so where nothing was measured yet."""
    path = RESULTS / "blocks.json"
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text())
    about, results = data["environment"], data["results"]
    names = list(dict.fromkeys(name for row in results for name in row["forward"]["timings"]))
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, triton "
        f"{about['triton']}, transformers {about['transformers']}, Liger {about['liger-kernel']}.",
        "",
        "![blocks](../benchmarks/results/blocks.png)",
    ]
    for phase in ("forward", "backward", "both"):
        lines += ["", f"{phase.capitalize()}:", ""]
        lines.append(f"| operation | tokens | hidden | {' | '.join(names)} | fastest peer / ours | GB/s | of a copy |")
        lines.append("|---" * (len(names) + 6) + "|")
        for row in results:
            part = row[phase]
            times = {name: timing["median_ms"] * 1e3 for name, timing in part["timings"].items()}
            peers = [time for name, time in times.items() if name != "trl_turbo"]
            cells = [row["op"], f"{row['n']:,}", f"{row['hidden']:,}"]
            cells += [f"{times[name]:,.1f}" if name in times else "-" for name in names]
            cells.append(f"{min(peers) / times['trl_turbo']:.2f}x")
            cells += [f"{part['gbps']:,.0f}", f"{part['gbps'] / part['copy_gbps']:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grpo() -> str:
    """Whole GRPO steps, one table a file; says so where nothing was measured yet."""
    return _contests("grpo_*.json", STEP_COLUMNS, lambda data: f"{data['shape']} {_words(data['arguments'])}")


def trainers() -> str:
    """Whole steps of other trainers, one table a file; says so where nothing was measured yet."""

    def title(data: dict[str, Any]) -> str:
        return f"{data['trainer']}, {data['shape']} {_words(data['arguments'])}"

    return _contests("trainer_*.json", STEP_COLUMNS[:2], title)


STEP_COLUMNS = (
    ("peak_gb", "peak at the driver, GB"),
    ("step_s", "step, s"),
    ("rollout_s", "rollout, s"),
    ("train_s", "training, s"),
    ("tokens_s", "tokens/s"),
)
#: TRL without a fused head, against which the least memory is claimed.
FOUNDING = "trl1.12"


def _contests(pattern: str, columns: tuple[tuple[str, str], ...], title: Callable[[dict[str, Any]], str]) -> str:
    files = sorted(RESULTS.glob(pattern))
    if not files:
        return "Not measured yet."
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


def plan() -> str:
    """Predicted and measured memory; says so where nothing was measured yet."""
    path = RESULTS / "plan.json"
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text())
    about = data["environment"]
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
    for row in data["results"]:
        cells = [
            f"{row['predicted_gb'][phase]:.2f} / {row['measured_gb'][phase]:.2f} ({row['off_by'][phase]:+.0%})"
            for phase in phases
        ]
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def longest() -> str:
    """The longest completions that were seen to fit; says so where nothing was measured yet."""
    files = sorted(RESULTS.glob("longest_*.json"))
    if not files:
        return "Not measured yet."
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


def attention() -> str:
    """The section's tables, in Markdown; says so where nothing was measured yet."""
    path = RESULTS / "attention.json"
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text())
    about, results = data["environment"], data["results"]
    peers = [name for row in results for name in row["both"]["timings"] if name != "trl_turbo"]
    peers = list(dict.fromkeys(peers))
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, triton "
        f"{about['triton']}.",
        "",
        "![attention](../benchmarks/results/attention.png)",
    ]
    for phase in ("forward", "backward", "both"):
        lines += ["", f"{phase.capitalize()}:", ""]
        lines.append(f"| batch | tokens | heads | trl_turbo | TFLOP/s | {' | '.join(peers)} |")
        lines.append("|---" * (len(peers) + 5) + "|")
        for row in results:
            times = {name: timing["median_ms"] for name, timing in row[phase]["timings"].items()}
            cells = [row["case"], f"{row['tokens']:,}", f"{row['heads']}/{row['key_heads']}"]
            cells += [f"{times['trl_turbo']:.2f}", f"{row[phase]['tflops']:.0f}"]
            for name in peers:
                ratio = f"{times[name]:.2f} ({times[name] / times['trl_turbo']:.2f}x)" if name in times else "-"
                cells.append(ratio)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def packing() -> str:
    """The section's table, in Markdown; says so where nothing was measured yet."""
    path = RESULTS / "packing.json"
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text())
    about, results = data["environment"], data["results"]
    names = list(results[0]["timings"])
    lines = [
        f"{about['card']}, driver {about['driver']}, CUDA {about['cuda']}; torch {about['torch']}, triton "
        f"{about['triton']}, TRL {about['trl']}, transformers {about['transformers']}. Medians in ms, in brackets MiB.",
        "",
        "![packing](../benchmarks/results/packing.png)",
        "",
        f"| batch | {' | '.join(names)} | as fast as stock | of its memory |",
        "|---" * (len(names) + 3) + "|",
    ]
    for row in results:
        timings = row["timings"]
        cells = [row["setting"]]
        for name in names:
            timing = timings.get(name)
            out = "out of memory"
            cells.append(out if timing is None else f"{timing['median_ms']:,.0f} ({timing['extra_mib']:,.0f})")
        stock, ours = timings.get("trl"), timings.get("trl_turbo")
        known = stock is not None and ours is not None
        cells.append(f"{stock['median_ms'] / ours['median_ms']:.2f}x" if known else "-")
        cells.append(f"{ours['extra_mib'] / stock['extra_mib']:.0%}" if known else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SECTIONS = {
    "grpo": grpo,
    "trainers": trainers,
    "plan": plan,
    "longest": longest,
    "linear_logprob": linear_logprob,
    "lora_fold": lora_fold,
    "lora": lora,
    "blocks": blocks,
    "attention": attention,
    "packing": packing,
}


def rendered(page: str) -> str:
    """The page with every marked section as the JSON has it.

    Raises:
        ValueError: A section's markers are missing.
    """
    for name, section in SECTIONS.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if start not in page or end not in page:
            raise ValueError(f"docs/benchmarks.md has no section between '{start}' and '{end}'; put the markers back.")
        before, after = page.split(start)[0], page.split(end)[1]
        page = f"{before}{start}\n{section()}\n{end}{after}"
    return page


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` say whether it differs."""
    page = PAGE.read_text()
    wanted = rendered(page)
    if "--check" in arguments:
        if page != wanted:
            print("docs/benchmarks.md is not what the JSON says: run python -m benchmarks.tables", file=sys.stderr)
        return int(page != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
