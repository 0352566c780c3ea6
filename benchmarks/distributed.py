"""A whole GRPO step on several GPUs of one host: TRL as it is, and the same script after `trl_turbo.patch()`.

    python -m benchmarks.distributed --way ddp --completion 1024 --out benchmarks/results/ranks_ddp
    python -m benchmarks.distributed --way fsdp2 --shape llama3.1-8b --rank 0 --prompts 4 --micro 32 --completion 256 \
        --steps 6 --share 0.3 --out benchmarks/results/ranks_fsdp2
    python -m benchmarks.distributed --way tp --out benchmarks/results/ranks_tp

`ddp` runs on one GPU and on all, each rank with as many sequences as one has alone, and judges the scaling; the step
that `benchmarks.scaling` predicts from the run on one GPU stands beside the measured one. `fsdp2` takes the
configuration that TRL ships for accelerate, `tp` spreads one vLLM over all GPUs. Peaks are the largest rank's, at the
driver. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import contest, measure, scaling
from benchmarks.contest import Contestant
from benchmarks.grpo import DRAWN, SHOWN

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


def contestants(way: str, ranks: int, features: Sequence[str]) -> dict[str, Contestant]:
    """TRL as it is and ours, for `ddp` on one GPU and on all."""
    more = ["--tensor-parallel", str(ranks)] if way == "tp" else []
    arguments = {"trl": more, "trl_turbo": [*more, "--before", contest.patch_line(features)]}
    counts = (1, ranks) if way == "ddp" else (ranks,)
    return {
        f"{name} on {count}": Contestant(given, launcher=launcher(way, count), one_gpu=count == 1)
        for name, given in arguments.items()
        for count in counts
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
    parser = contest.parser(__doc__)
    parser.add_argument("--way", required=True, choices=WAYS)
    parser.add_argument("--ranks", type=int, default=2)
    args, given = parser.parse_known_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast is not there in every virtual machine
    about = contest.environment(("vllm", "transformers", "peft", "triton", "accelerate"))
    held = contestants(args.way, args.ranks, args.features)
    results = contest.hold("benchmarks.grpo_run", held, args, given, SHOWN)
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
        measure.write(args.out, data, lambda path: contest.picture(results, title, path, DRAWN))
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
