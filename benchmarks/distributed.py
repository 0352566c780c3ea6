"""A whole GRPO step on several GPUs of one host: TRL as it is, and the same script after `trl_turbo.patch()`.

    python -m benchmarks.distributed --way ddp --completion 1024 --out benchmarks/results/ranks_ddp
    python -m benchmarks.distributed --way fsdp2 --shape llama3.1-8b --rank 0 --out benchmarks/results/ranks_fsdp2
    python -m benchmarks.distributed --way tp --out benchmarks/results/ranks_tp

`ddp` runs on one GPU and on all, each rank with as many sequences as one has alone, and judges the scaling; the step
that `benchmarks.scaling` predicts from the run on one GPU stands beside the measured one. `fsdp2` takes the
configuration that TRL ships for accelerate, `tp` spreads one vLLM over all GPUs. Peaks are the largest rank's, at the
driver. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure, models, scaling
from benchmarks.grpo import FEATURES, SHOWN, patch_line, picture, run

WAYS = ("ddp", "fsdp2", "tp")
#: Samples a second on two GPUs, over those on one.
SCALING_BAR = 1.8


def launcher(way: str, ranks: int) -> list[str]:
    """Python's arguments that start so many ranks, none for one."""
    if ranks == 1:
        return []
    if way == "fsdp2":
        found = importlib.util.find_spec("trl")
        if found is None or found.origin is None:
            raise ModuleNotFoundError("trl is not installed, and its accelerate configuration is needed; install it")
        config = Path(found.origin).parent / "accelerate_configs" / "fsdp2.yaml"
        return ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(ranks)]
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def runs(way: str, ranks: int, features: Sequence[str], only: Sequence[str] | None) -> dict[str, tuple[list[str], int]]:
    """Name -> further arguments of `benchmarks.grpo_run`, and how many ranks."""
    more = ["--tensor-parallel", str(ranks)] if way == "tp" else []
    contestants = {"trl": [], "trl_turbo": ["--before", patch_line(features)]}
    counts = (1, ranks) if way == "ddp" else (ranks,)
    return {
        f"{name} on {count}": ([*more, *arguments], count)
        for name, arguments in contestants.items()
        for count in counts
        if not only or name in only
    }


def verdicts(way: str, results: dict[str, dict[str, Any]], ranks: int) -> list[str]:
    """What is missed, one sentence each; for `ddp` the model's prediction enters the results."""
    good = {name: found for name, found in results.items() if "error" not in found}
    missed = [f"{name} failed: {found['error']}" for name, found in results.items() if "error" in found]
    ours, stock = good.get(f"trl_turbo on {ranks}"), good.get(f"trl on {ranks}")
    if way == "ddp":
        for name in ("trl", "trl_turbo"):
            alone, several = good.get(f"{name} on 1"), good.get(f"{name} on {ranks}")
            if alone is not None and several is not None:
                several["model"] = scaling.check(alone, several)
        bar = SCALING_BAR / 2 * ranks
        scaled = ours["model"]["scaling"] if ours is not None and "model" in ours else None
        if scaled is not None and scaled < bar:
            missed.append(f"{ranks} GPUs give {scaled:.2f}x the samples of one, and the bar is {bar:.2f}x")
    if ours is not None and stock is not None and way == "fsdp2":
        missed += [
            f"{label} is {ours[key]:.4g}, and TRL's is {stock[key]:.4g}"
            for key, label in SHOWN[:2]
            if ours[key] > stock[key]
        ]
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--way", required=True, choices=WAYS)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=models.SHAPES)
    parser.add_argument("--folder", type=Path, help="where the model is or will be; by default under /tmp")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", help="contestants, by name")
    parser.add_argument("--features", nargs="*", default=FEATURES, help="of patch(), for trl_turbo")
    args, given = parser.parse_known_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast is not there in every virtual machine
    about = measure.environment(("trl", "vllm", "transformers", "peft", "triton", "accelerate"))
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    folder = args.folder or Path("/tmp") / f"trl_turbo-{args.shape}"
    # In a process of its own too, so that no memory of this one is in any peak
    subprocess.run([sys.executable, "-m", "benchmarks.models", args.shape, str(folder)], check=True)
    results = {}
    for name, (more, count) in runs(args.way, args.ranks, args.features, args.only).items():
        log = Path(f"{args.out or '/tmp/trl_turbo_bench'}.{name.replace(' ', '_')}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["--model", str(folder), *given, *more]
        found = results[name] = run(arguments, None, log, launcher=launcher(args.way, count))
        print(f"{name:<16}", found.get("error", ""), end="")
        print("  ".join(f"{label} {found[key]:.4g}" for key, label in SHOWN if found.get(key) is not None), flush=True)
    missed = verdicts(args.way, results, args.ranks)
    for name, found in results.items():
        if "model" in found:
            print(name, "  ".join(f"{key} {value:.3g}" for key, value in found["model"].items()))
    for sentence in missed:
        print("MISSED:", sentence)
    if args.out is not None:
        data = {"environment": about, "way": args.way, "ranks": args.ranks, "shape": args.shape, "arguments": given}
        data |= {"features": list(args.features), "results": results, "missed": missed}
        title = f"GRPO, {args.way}, {args.ranks} x {about['card']}, {args.shape}, {' '.join(given) or 'defaults'}"
        measure.write(args.out, data, lambda path: picture(results, title, path))
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
