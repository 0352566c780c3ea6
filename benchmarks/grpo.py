"""A whole GRPO step with vLLM rollouts: TRL as it is, and the same script after `trl_turbo.patch()`.

    python -m benchmarks.grpo --shape qwen2.5-1.5b --completion 4096 --out benchmarks/results/grpo_1.5b_8x4096

Each contestant runs in a process of its own, one after the other on one machine: hosts differ by a third in what their
processors give vLLM, so a time is worth something as a ratio within one call alone. The peak is the driver's. A run
whose sampled log-probs are not the trainer's is reported as wrong and not timed. `--path trl1.12=FOLDER` adds TRL from
another folder, stock; `--also "fp8=rollout_kv_cache_dtype='fp8'"` adds ours with more keywords of `patch()`, whose gap
is told and not judged. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import importlib.util

from benchmarks import contest, measure
from benchmarks.contest import Contestant

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
DRAWN = (SHOWN[0], SHOWN[1], SHOWN[3])


def main() -> int:
    parser = contest.parser(__doc__)
    parser.add_argument("--path", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=KEYWORDS")
    args, given = parser.parse_known_args()
    about = contest.environment(("vllm", "transformers", "peft", "triton", "liger-kernel", "unsloth", "bitsandbytes"))
    contestants = contest.stock_elsewhere(args.path) | {
        "trl": Contestant(),
        "trl+liger": Contestant(["--liger"]),
        "unsloth": Contestant(["--unsloth"]),
        "trl_turbo": Contestant(["--before", contest.patch_line(args.features)]),
    }
    for name, package in PEERS.items():
        if importlib.util.find_spec(package) is None:
            del contestants[name]
    for name, _, keywords in (each.partition("=") for each in args.also):
        # What keywords change of the samples is among what is asked
        ours = ["--before", contest.patch_line(args.features, keywords)]
        contestants[name] = Contestant(ours, same_weights=False)
    results = contest.hold("benchmarks.grpo_run", contestants, args, given, SHOWN)
    if "error" not in results.get("trl", {"error": ""}) and "error" not in results.get("trl_turbo", {"error": ""}):
        ours, stock = results["trl_turbo"], results["trl"]
        ratios = {key: ours[key] / stock[key] for key in ("peak_gb", "step_s", "train_s", "tokens_s")}
        print("trl_turbo / trl:  " + "  ".join(f"{key} {value:.2f}x" for key, value in ratios.items()))
    if args.out is not None:
        data = {"environment": about, "shape": args.shape, "arguments": given}
        data |= {"features": list(args.features), "results": results}
        title = f"GRPO, {args.shape}, {' '.join(given) or 'defaults'}, {about['card']}"
        measure.write(args.out, data, lambda path: contest.picture(results, title, path, DRAWN))
    return int(any("error" in found for found in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
