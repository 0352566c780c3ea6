"""One trainer's training: TRL as it is, the same with Liger, and the same script after `trl_turbo.patch()`.

    python -m benchmarks.trainers --trainer dpo --length 4096 --out benchmarks/results/trainer_dpo

Each contestant runs in a process of its own, one after the other on one machine, on the same work and seed; the peak is
the driver's. `--path trl1.12=FOLDER` adds a stock TRL from another folder, and `--turbo-path FOLDER` runs ours over it
too (PPO is only there up to 1.12). Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import importlib.util

from benchmarks import contest, measure
from benchmarks.contest import Contestant
from benchmarks.trainers_run import TRAINERS

SHOWN = (("peak_gb", "peak GB"), ("step_s", "step s"), ("torch_gb", "torch GB"), ("loaded_gb", "loaded GB"))


def contestants(args: argparse.Namespace) -> dict[str, Contestant]:
    """Stock TRL of each version, and ours over the one or the other."""
    ours = ["--before", contest.patch_line(args.features)]
    found = contest.stock_elsewhere(args.path)
    if args.trainer != "ppo" or not args.turbo_path:
        found["trl"] = Contestant()
        if args.trainer in ("grpo", "rloo", "dpo") and importlib.util.find_spec("liger_kernel") is not None:
            found["trl+liger"] = Contestant(["--liger"])
        found["trl_turbo"] = Contestant(ours)
    if args.turbo_path:
        found["trl_turbo over the other TRL"] = Contestant(ours, args.turbo_path)
    return found


def main() -> int:
    parser = contest.parser(__doc__)
    parser.add_argument("--trainer", required=True, choices=TRAINERS)
    parser.add_argument("--path", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--turbo-path", metavar="FOLDER")
    args, given = parser.parse_known_args()
    about = contest.environment(("vllm", "transformers", "peft", "triton", "liger-kernel", "bitsandbytes"))
    arguments = ["--trainer", args.trainer, *given]
    results = contest.hold("benchmarks.trainers_run", contestants(args), args, arguments, SHOWN)
    if args.out is not None:
        data = {"environment": about, "trainer": args.trainer, "shape": args.shape, "arguments": given}
        data |= {"features": list(args.features), "results": results}
        title = f"{args.trainer}, {args.shape}, {' '.join(given) or 'defaults'}, {about['card']}"
        measure.write(args.out, data, lambda path: contest.picture(results, title, path, SHOWN[:2]))
    return int(any("error" in found for found in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
