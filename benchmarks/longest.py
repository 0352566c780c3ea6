"""The longest completion whose training fits into a capped GPU: GRPO, the training part alone, a process a probe.

    python -m benchmarks.longest --cap-gb 80 --bar 120000 --out benchmarks/results/longest_80gb
    python -m benchmarks.longest --cap-gb 24 --bar 36000 --out benchmarks/results/longest_24gb

The first probe is the bar itself; then the search goes up or down by what the last one took, and halves the interval
that is left, for as many probes as `--probes` says. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import contest, measure, models
from benchmarks.contest import FEATURES, Contestant

#: Lengths are tried in steps of this many tokens.
GRAIN = 1000


def following(probes: list[dict[str, Any]], bar: int) -> int | None:
    """The next length to try, `None` where the search is over.

    Args:
        probes: What was found: `completion`, `fits` and `peak_gb` of each, and the `cap_gb`.
        bar: What to try first.
    """
    if not probes:
        return bar
    fits = max((p["completion"] for p in probes if p["fits"]), default=0)
    fails = min((p["completion"] for p in probes if not p["fits"]), default=None)
    if fails is None:
        last = max(probes, key=lambda p: p["completion"])
        # What grows with the length is what is not there at length 0; a tenth of it is left for what comes in steps
        room = last["cap_gb"] / max(last["peak_gb"], 1e-9)
        wanted = int(fits * min(1.5, max(1.05, 0.9 * room)))
    else:
        if fails - fits <= GRAIN:
            return None
        wanted = (fits + fails) // 2 if fits else int(0.8 * fails)
    wanted = wanted // GRAIN * GRAIN
    if wanted <= fits or any(p["completion"] == wanted for p in probes):
        wanted = fits + GRAIN
    return None if fails is not None and wanted >= fails else wanted


def picture(probes: list[dict[str, Any]], cap_gb: float, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for fits, marker in ((True, "o"), (False, "x")):
        shown = [p for p in probes if p["fits"] == fits]
        label = "fits" if fits else "out of memory"
        axis.plot([p["completion"] for p in shown], [p["peak_gb"] for p in shown], marker, label=label)
    axis.axhline(cap_gb, linestyle="--", color="grey")
    axis.set_xlabel("completion tokens")
    axis.set_ylabel("peak GB")
    axis.set_title(title)
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shape", default="qwen3-8b", choices=models.SHAPES)
    parser.add_argument("--folder", type=Path, help="where the model is or will be; by default under /tmp")
    parser.add_argument("--cap-gb", type=float, default=80.0)
    parser.add_argument("--bar", type=int, default=120_000)
    parser.add_argument("--probes", type=int, default=3)
    parser.add_argument("--sixteen-bit", action="store_true", help="a bf16 base instead of nf4")
    parser.add_argument("--stock", action="store_true", help="TRL as it is")
    parser.add_argument("--features", nargs="*", default=[f for f in FEATURES if f != "rollout"])
    parser.add_argument("--out", type=Path)
    args, given = parser.parse_known_args()
    about = contest.environment(("transformers", "peft", "triton", "bitsandbytes"))
    fixed = ["--model", str(contest.model(args.shape, args.folder)), "--cap-gb", str(args.cap_gb), *given]
    fixed += [] if args.sixteen_bit else ["--load-in-4bit"]
    fixed += [] if args.stock else ["--before", contest.patch_line(args.features)]
    probes: list[dict[str, Any]] = []
    while len(probes) < args.probes and (completion := following(probes, args.bar)) is not None:
        log = Path(f"{args.out or '/tmp/trl_turbo_longest'}.{completion}.log")
        found = contest.run("benchmarks.longest_run", Contestant([*fixed, "--completion", str(completion)]), log)
        if "error" in found:
            print(f"{completion:>9,} tokens  {found['error']}")
            return 1
        probes.append(found | {"cap_gb": args.cap_gb})
        verdict = "fits" if found["fits"] else found["out_of_memory"]
        seconds = ", ".join(f"{t:.1f}" for t in found["micro_batch_s"])
        print(f"{completion:>9,} tokens  peak {found['peak_gb']:.2f} GB  {seconds} s  {verdict}", flush=True)
    longest = max((p["completion"] for p in probes if p["fits"]), default=0)
    print(f"longest that was seen to fit: {longest:,} (bar {args.bar:,})")
    if args.out is not None:
        data = {"environment": about, "shape": args.shape, "four_bit": not args.sixteen_bit, "stock": args.stock}
        data |= {"cap_gb": args.cap_gb, "bar": args.bar, "longest": longest, "results": probes}
        title = f"{args.shape}, {about['card']} capped at {args.cap_gb:g} GB"
        measure.write(args.out, data, lambda path: picture(probes, args.cap_gb, title, path))
    return int(longest < args.bar)


if __name__ == "__main__":
    raise SystemExit(main())
