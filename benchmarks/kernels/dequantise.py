"""Weights in bitsandbytes' 4 bits back to 16, in one launch, against bitsandbytes' own three.

    python -m benchmarks.kernels.dequantise --out benchmarks/results/dequantise

Checks first that every bit is bitsandbytes', and refuses to time a wrong kernel. Then the device's time, the bytes that
must be read and written over it as a share of what a copy reaches, and the host's time of a call. Writes OUT.json and
OUT.png. `--tiles` times other tiles too. Without a CUDA device it runs a tiny size, to show that it runs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from benchmarks import measure
from benchmarks.kernels.blocks import CUDA, DEVICE, copies_for, copy_gbps, device_ms
from trl_turbo.kernels.dequantise import Dequantiser, form

DTYPE = torch.bfloat16
#: The share of a copy's bytes a second that is to be reached.
BAR = 0.85
#: [out, in]: o and up of Qwen2.5-1.5B, o and up of Llama-3.1-8B
SHAPES = ((1536, 1536), (8960, 1536), (4096, 4096), (14336, 4096)) if CUDA else ((64, 128),)
#: Bytes, warps and whether the table is shuffled
TILES = [(size, warps, on) for size in (1024, 2048, 4096) for warps in (4, 8) for on in (True, False)]
_CALLS = 200 if CUDA else 2

#: Packed bytes, their state and where to write them.
Weight = tuple[torch.Tensor, Any, torch.Tensor]


def weights(shape: tuple[int, int]) -> list[Weight]:
    """Double-quantised nf4 with the same numbers, as many times as makes more than an L2 of them."""
    packed, state = quantize_4bit(
        torch.randn(shape, device=DEVICE).mul_(0.02).to(DTYPE), quant_type="nf4", compress_statistics=True
    )
    count = copies_for(moved(packed, state))
    return [
        (packed.clone(), copy.deepcopy(state), torch.empty(shape, dtype=DTYPE, device=DEVICE)) for _ in range(count)
    ]


def moved(packed: torch.Tensor, state: Any) -> int:
    """Bytes that must be read and written."""
    scales = state.absmax.nbytes + state.state2.absmax.nbytes
    return packed.nbytes + scales + state.shape.numel() * DTYPE.itemsize


def ours(weight: Weight) -> Callable[[], object]:
    packed, state, out = weight
    return partial(Dequantiser(packed, state), out)


def theirs(weight: Weight) -> Callable[[], object]:
    packed, state, out = weight
    return partial(dequantize_4bit, packed, state, out=out) if CUDA else partial(dequantize_4bit, packed, state)


def check(weight: Weight) -> None:
    """Raise `SystemExit` where a bit is not bitsandbytes'."""
    packed, state, out = weight
    out.fill_(torch.nan)
    ours(weight)()
    wrong = int((out.view(torch.int16) != dequantize_4bit(packed, state).view(torch.int16)).sum())
    if wrong:
        raise SystemExit(f"Wrong results are not timed: {wrong} of {out.numel()} numbers are not bitsandbytes'.")
    if CUDA and form.form(packed, state) is None:
        raise SystemExit("Nothing of ours would be timed: the kernel does not take this weight.")


def host_us(run: Callable[[], object]) -> float:
    """The host's time of a call, the device not being waited for."""
    times = []
    for _ in range(5):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS):
            run()
        times.append((time.perf_counter() - start) / _CALLS * 1e6)
    return statistics.median(times)


def bench(shape: tuple[int, int], rounds: int, tiles: bool) -> dict[str, Any]:
    made = weights(shape)
    check(made[0])
    nbytes = moved(*made[0][:2])
    contestants = {"trl_turbo": ours, "bitsandbytes": theirs}
    runs = {who: [of(weight) for weight in made] for who, of in contestants.items()}
    times: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(rounds):
        for who, found in times.items():
            found += device_ms(runs[who], 1)
    timings = {}
    for who, found in times.items():
        found.sort()
        timings[who] = {
            "median_ms": round(statistics.median(found), 5),
            "low_ms": round(found[len(found) // 10], 5),
            "high_ms": round(found[-1 - len(found) // 10], 5),
            "host_us": round(host_us(runs[who][0]), 2),
        }
    copied, gbps = copy_gbps(nbytes, rounds), nbytes / timings["trl_turbo"]["median_ms"] / 1e6
    print(f"\n  {shape[0]:,} x {shape[1]:,}: {gbps:,.0f} GB/s, {gbps / copied:.0%} of a copy's {copied:,.0f}")
    for who, timing in timings.items():
        print(f"    {who:<14}{timing['median_ms'] * 1e3:>9.1f} us{timing['host_us']:>9.1f} us on the host")
    if tiles:
        other_tiles(made, rounds)
    return {
        "shape": list(shape),
        "bytes": nbytes,
        "gbps": round(gbps, 1),
        "copy_gbps": round(copied, 1),
        "timings": timings,
    }


def other_tiles(made: list[Weight], rounds: int) -> None:
    """Times of tiles that could be the kernel's."""
    usual = form.BYTES, form.WARPS, form.SHUFFLE
    try:
        for tile in TILES:
            form.BYTES, form.WARPS, form.SHUFFLE = tile
            check(made[0])
            median_ms = statistics.median(device_ms([ours(weight) for weight in made], rounds))
            print(f"    {tile}: {median_ms * 1e3:.1f} us{' (used)' if tile == usual else ''}")
    finally:
        form.BYTES, form.WARPS, form.SHUFFLE = usual


def picture(results: list[dict[str, Any]], card: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    shares = {
        name: [row["bytes"] / row["timings"][name]["median_ms"] / 1e6 / row["copy_gbps"] for row in results]
        for name in results[0]["timings"]
    }
    for name, bars in measure.grouped_bars(axis, shares).items():
        axis.bar_label(bars, [f"{row['timings'][name]['median_ms'] * 1e3:.1f} us" for row in results], fontsize=7)
    axis.axhline(BAR, color="black", linestyle="dotted")
    axis.set_xticks(range(len(results)), ["{:,} x {:,}".format(*row["shape"]) for row in results])
    axis.set_ylabel("share of a copy's bytes a second")
    axis.legend(fontsize=7)
    figure.suptitle(f"Double-quantised nf4 to bf16, {card}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    parser.add_argument("--rounds", type=int, default=21 if CUDA else 3)
    parser.add_argument("--tiles", action="store_true", help="time other tiles too")
    args = parser.parse_args()
    torch.manual_seed(0)
    about = measure.environment(("triton", "bitsandbytes"))
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    for shape in SHAPES:
        results.append(bench(shape, args.rounds, args.tiles and CUDA))
        if CUDA:
            torch.cuda.empty_cache()
    below = ["{:,} x {:,}".format(*row["shape"]) for row in results if row["gbps"] < BAR * row["copy_gbps"]]
    if CUDA:
        print(f"\nbelow {BAR:.0%} of a copy: {', '.join(below) or 'none'}")
    if args.out is not None:
        data = {"environment": about, "bar": BAR, "below": below, "results": results}
        measure.write(args.out, data, lambda path: picture(results, about["card"], path))


if __name__ == "__main__":
    main()
