"""One trainer's training: TRL as it is, the same with Liger, and the same script after `trl_turbo.patch()`.

    python -m benchmarks.trainers --trainer dpo --length 4096 --out benchmarks/results/trainer_dpo

Each contestant runs in a process of its own, one after the other on one machine, on the same work and seed; the peak is
the driver's. `--path trl1.12=FOLDER` adds a stock TRL from another folder, and `--turbo-path FOLDER` runs ours over it
too (PPO is only there up to 1.12). Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import measure, models
from benchmarks.grpo import FEATURES, patch_line, run
from benchmarks.trainers_run import TRAINERS

SHOWN = (("peak_gb", "peak GB"), ("step_s", "step s"), ("torch_gb", "torch GB"), ("loaded_gb", "loaded GB"))


def contestants(args: argparse.Namespace) -> dict[str, tuple[list[str], str | None]]:
    """Name -> further arguments of the run, and where TRL comes from."""
    ours = ["--before", patch_line(args.features)]
    found: dict[str, tuple[list[str], str | None]] = {
        name: ([], path) for name, path in (each.split("=", 1) for each in args.path)
    }
    if args.trainer != "ppo" or not args.turbo_path:
        found["trl"] = ([], None)
        if args.trainer in ("grpo", "rloo", "dpo") and importlib.util.find_spec("liger_kernel") is not None:
            found["trl+liger"] = (["--liger"], None)
        found["trl_turbo"] = (ours, None)
    if args.turbo_path:
        found["trl_turbo over the other TRL"] = (ours, args.turbo_path)
    return {name: how for name, how in found.items() if not args.only or name in args.only}


def picture(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {name: r for name, r in results.items() if "error" not in r}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (key, label) in zip(axes, SHOWN[:2], strict=True):
        axis.bar_label(axis.bar(list(drawn), [r[key] for r in drawn.values()]), fmt="%.4g")
        axis.set_title(label)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--trainer", required=True, choices=TRAINERS)
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=models.SHAPES)
    parser.add_argument("--folder", type=Path, help="where the model is or will be; by default under /tmp")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", help="contestants, by name")
    parser.add_argument("--features", nargs="*", default=FEATURES, help="of patch(), for trl_turbo")
    parser.add_argument("--path", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--turbo-path", metavar="FOLDER")
    args, given = parser.parse_known_args()
    about = measure.environment(("trl", "vllm", "transformers", "peft", "triton", "liger-kernel", "bitsandbytes"))
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    folder = args.folder or Path("/tmp") / f"trl_turbo-{args.shape}"
    # In a process of its own too, so that no memory of this one is in any peak
    subprocess.run([sys.executable, "-m", "benchmarks.models", args.shape, str(folder)], check=True)
    results = {}
    for name, (more, path) in contestants(args).items():
        log = Path(f"{args.out or '/tmp/trl_turbo_bench'}.{name.replace(' ', '_')}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["--trainer", args.trainer, "--model", str(folder), *given, *more]
        found = results[name] = run(arguments, path, log, "benchmarks.trainers_run")
        print(f"{name:<28}", found.get("error", ""), end="")
        print("  ".join(f"{label} {found[key]:.4g}" for key, label in SHOWN if key in found), flush=True)
    if args.out is not None:
        data = {"environment": about, "trainer": args.trainer, "shape": args.shape, "arguments": given}
        data |= {"features": list(args.features), "results": results}
        title = f"{args.trainer}, {args.shape}, {' '.join(given) or 'defaults'}, {about['card']}"
        measure.write(args.out, data, lambda path: picture(results, title, path))
    return int(any("error" in found for found in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
