"""Predicted memory against the driver's, in rollouts and in training, on four shapes in a process each.

    python -m benchmarks.plan --out benchmarks/results/plan

The prediction is made from the configuration alone, before anything is loaded, and again from the trainer. What is
measured is what the driver has in use at the end of each phase and at its peak; before CUDA starts, nvidia-smi says
what others use, and that is taken off. The bar is 10 % for both phases. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import contest, measure, models
from benchmarks.contest import FEATURES, Contestant

BAR = 0.1
#: Name -> shape, and arguments of the run.
CASES: dict[str, tuple[str, list[str]]] = {
    "1.5B, 8 x 512": ("qwen2.5-1.5b", ["--completion", "512"]),
    "1.5B, 8 x 4,096": ("qwen2.5-1.5b", ["--completion", "4096"]),
    "1.5B, 8 x 4,096, nothing but logprob and rollout": ("qwen2.5-1.5b", ["--completion", "4096"]),
    "8B nf4, 8 x 512": ("llama3.1-8b", ["--completion", "512", "--load-in-4bit"]),
}
PLAIN = ("rollout", "memory")
PHASES = ("rollout", "training")


def features_of(case: str) -> tuple[str, ...]:
    """What `patch()` turns on in a case."""
    return PLAIN if "nothing but" in case else FEATURES


def used_by_others() -> int:
    """Bytes that nvidia-smi says are in use before this benchmark starts anything."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    query += ["--id", (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(done.stdout.splitlines()[0]) << 20


def predicted(shape: str, arguments: list[str], features: tuple[str, ...]) -> dict[str, int]:
    """Bytes of each phase, from the configuration."""
    from trl_turbo.memory_plan import predict
    from trl_turbo.memory_plan.prediction import FEATURES as KNOWN

    completion = int(arguments[arguments.index("--completion") + 1])
    plan = predict(
        models.config(shape),
        group=8,
        prompt=128,
        completion=completion,
        lora_rank=16,
        load_in_4bit="--load-in-4bit" in arguments,
        features=("logprob", *(name for name in KNOWN if name in features)),
    )
    print(plan)
    return {phase: plan.phase_bytes(phase) or 0 for phase in PHASES}


def row(case: str, found: dict[str, Any], wanted: dict[str, int], others: int) -> dict[str, Any]:
    """One case: predicted and measured by phase, and at the peak."""
    measured = {phase: found["phases"][phase]["measured"] - others for phase in PHASES}
    measured["peak"] = int((found["in_use_at_first_gb"] + found["peak_gb"]) * 2**30) - others
    wanted = wanted | {"peak": max(wanted.values())}
    totals = found["plan"]["totals"]
    again = {"rollout": totals["rollout"], "training": max(totals["scoring"], totals["backward"])}
    return {
        "case": case,
        "predicted_gb": {phase: size / 2**30 for phase, size in wanted.items()},
        "from_trainer_gb": {phase: size / 2**30 for phase, size in again.items()},
        "measured_gb": {phase: size / 2**30 for phase, size in measured.items()},
        "off_by": {phase: wanted[phase] / measured[phase] - 1 for phase in measured},
        "moments": found["plan"]["moments"],
        "torch_gb": found["torch_gb"],
        "engine": found["memory"],
    }


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{row['case']}\n{phase}" for row in rows for phase in PHASES]
    figure, axis = plt.subplots(figsize=(11, 0.6 + 0.5 * len(names)), layout="constrained")
    places = range(len(names))
    for shift, key in ((-0.2, "predicted_gb"), (0.2, "measured_gb")):
        values = [row[key][phase] for row in rows for phase in PHASES]
        bars = axis.barh([place + shift for place in places], values, 0.4, label=key.removesuffix("_gb"))
        axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set_yticks(list(places), names)
    axis.invert_yaxis()
    axis.set_xlabel("GiB at the driver")
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", type=int, help="cases, by number from 0")
    args, given = parser.parse_known_args()
    about = contest.environment(("vllm", "transformers", "peft", "triton", "bitsandbytes"))
    others = used_by_others()
    rows: list[dict[str, Any]] = []
    failed = []
    for number, (case, (shape, arguments)) in enumerate(CASES.items()):
        if args.only and number not in args.only:
            continue
        print(f"\n{case}")
        folder = contest.model(shape)
        wanted = predicted(shape, arguments, features_of(case))
        log = Path(f"{args.out or '/tmp/trl_turbo_plan'}.{number}.log")
        before = ["--before", contest.patch_line(features_of(case))]
        who = Contestant(["--model", str(folder), "--steps", "3", *arguments, *given, *before])
        found = contest.run("benchmarks.grpo_run", who, log)
        if "error" in found or not found.get("phases"):
            failed.append(case)
            print(found.get("error", "no phase was measured"))
            continue
        rows.append(row(case, found, wanted, others))
        for phase, off in rows[-1]["off_by"].items():
            sizes = (rows[-1][key][phase] for key in ("predicted_gb", "measured_gb"))
            print("{:<9} predicted {:6.2f}  measured {:6.2f}  off by {:+.1%}".format(phase, *sizes, off), flush=True)
    if args.out is not None and rows:
        data = {"environment": about, "bar": BAR, "results": rows}
        measure.write(args.out, data, lambda path: picture(rows, path))
    wide = [row["case"] for row in rows if any(abs(off) > BAR for off in row["off_by"].values())]
    print(f"off by more than {BAR:.0%}: {', '.join(wide) or 'none'}")
    return int(bool(failed or wide))


if __name__ == "__main__":
    raise SystemExit(main())
