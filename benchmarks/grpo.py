"""A whole GRPO step with vLLM rollouts: TRL as it is, and the same script after `trl_turbo.patch()`.

    python -m benchmarks.grpo --shape qwen2.5-1.5b --completion 4096 --out benchmarks/results/grpo_1.5b_8x4096

Each contestant runs in a process of its own, one after the other on one machine: hosts differ by a third in what their
processors give vLLM, so a time is worth something as a ratio within one call alone. The peak is the driver's. A run
whose sampled log-probs are not the trainer's is reported as wrong and not timed. `--path trl1.12=FOLDER` adds TRL from
another folder, stock. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure, models

#: What is on for trl_turbo beside the log-prob.
FEATURES = (
    "rollout",
    "shared_pass",
    "lora",
    "norms",
    "rope",
    "mlp",
    "attention",
    "packing",
    "checkpointing",
    "mlp_tiling",
    "memory",
)
#: Mean difference of a sampled token's log-prob between vLLM and the trainer; the weights are then not the same.
LARGEST_GAP = 0.05
#: Contestants that need a package.
PEERS = {"trl+liger": "liger_kernel", "unsloth": "unsloth"}
SHOWN = (
    ("peak_gb", "peak GB"),
    ("step_s", "step s"),
    ("rollout_s", "rollout s"),
    ("train_s", "training s"),
    ("tokens_s", "tokens/s"),
    ("sync_ms", "weight sync ms"),
    ("logp_gap_largest", "largest log-prob gap"),
)


def patch_line(features: Iterable[str]) -> str:
    """What a script says for these features, and no others of `FEATURES`."""
    wanted = dict.fromkeys(FEATURES, False) | dict.fromkeys(features, True)
    return f"import trl_turbo; trl_turbo.patch({', '.join(f'{name}={on}' for name, on in wanted.items())})"


def run(
    given: list[str],
    path: str | None,
    log: Path,
    module: str = "benchmarks.grpo_run",
    launcher: Sequence[str] = (),
) -> dict[str, Any]:
    """Train once in a new process, or in those that a launcher starts.

    Args:
        given: Arguments of the module.
        path: Where to import TRL from, if not from the environment.
        log: What it prints goes here.
        module: What runs.
        launcher: What starts it, as Python's own arguments, where it is not this Python itself.

    Returns:
        What it measured, or `error` with the last line that it printed.
    """
    env = dict(os.environ)
    if path:
        env["PYTHONPATH"] = path + (os.pathsep + env["PYTHONPATH"] if env.get("PYTHONPATH") else "")
    with log.open("w") as out:
        subprocess.run([sys.executable, *launcher, "-m", module, *given], stdout=out, stderr=subprocess.STDOUT, env=env)
    lines = log.read_text(errors="replace").splitlines()
    for line in lines:
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            if not (found.get("logp_gap_largest") or 0) <= LARGEST_GAP:
                return {"error": f"its samples are of other weights: gap {found['logp_gap_largest']:.3g}"} | found
            return found
    return {"error": next((line for line in reversed(lines) if line.strip()), "printed nothing")}


def picture(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {name: r for name, r in results.items() if "error" not in r}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (key, label) in zip(axes, (SHOWN[0], SHOWN[1], SHOWN[3]), strict=True):
        bars = axis.bar(list(drawn), [r[key] for r in drawn.values()])
        axis.bar_label(bars, fmt="%.4g")
        axis.set_title(label)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=models.SHAPES)
    parser.add_argument("--folder", type=Path, help="where the model is or will be; by default under /tmp")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", help="contestants, by name")
    parser.add_argument("--features", nargs="*", default=FEATURES, help="of patch(), for trl_turbo")
    parser.add_argument("--path", action="append", default=[], metavar="NAME=FOLDER")
    args, given = parser.parse_known_args()
    about = measure.environment(
        ("trl", "vllm", "transformers", "peft", "triton", "liger-kernel", "unsloth", "bitsandbytes")
    )
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    folder = args.folder or Path("/tmp") / f"trl_turbo-{args.shape}"
    # In a process of its own too, so that no memory of this one is in any peak
    subprocess.run([sys.executable, "-m", "benchmarks.models", args.shape, str(folder)], check=True)
    contestants: dict[str, tuple[list[str], str | None]] = {
        name: ([], path) for name, path in (each.split("=", 1) for each in args.path)
    }
    contestants |= {
        "trl": ([], None),
        "trl+liger": (["--liger"], None),
        "unsloth": (["--unsloth"], None),
        "trl_turbo": (["--before", patch_line(args.features)], None),
    }
    missing = {name for name, package in PEERS.items() if importlib.util.find_spec(package) is None}
    results = {}
    for name, (more, path) in contestants.items():
        if (args.only and name not in args.only) or name in missing:
            continue
        log = Path(f"{args.out or '/tmp/trl_turbo_bench'}.{name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        results[name] = run(["--model", str(folder), *given, *more], path, log)
        found = results[name]
        print(f"{name:<12}", found.get("error", ""), end="")
        print("  ".join(f"{label} {found[key]:.4g}" for key, label in SHOWN if found.get(key) is not None), flush=True)
    if "error" not in results.get("trl", {"error": ""}) and "error" not in results.get("trl_turbo", {"error": ""}):
        ours, stock = results["trl_turbo"], results["trl"]
        ratios = {key: ours[key] / stock[key] for key in ("peak_gb", "step_s", "train_s", "tokens_s")}
        print("trl_turbo / trl:  " + "  ".join(f"{key} {value:.2f}x" for key, value in ratios.items()))
    if args.out is not None:
        data = {
            "environment": about,
            "shape": args.shape,
            "arguments": given,
            "features": list(args.features),
            "results": results,
        }
        args.out.with_name(args.out.name + ".json").write_text(json.dumps(data, indent=1) + "\n")
        title = f"GRPO, {args.shape}, {' '.join(given) or 'defaults'}, {about['card']}"
        picture(results, title, args.out.with_name(args.out.name + ".png"))
    return int(any("error" in found for found in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
