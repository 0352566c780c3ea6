"""Linear layers of a decode step, where reading the weight is the time, against cuBLAS and an activation behind it.

    python -m benchmarks.kernels.skinny --out benchmarks/results/skinny

Checks first that nothing is further from float64 than plain torch in the same dtype, and that a replayed CUDA graph
gives the same bits; refuses to time a wrong kernel. Then the time of a layer inside a captured graph of many layers,
each with a weight of its own, so that the L2 serves none. Writes OUT.json and OUT.png. `--tiles` then times all other
tiles, and writes OUT_tiles.json. Without a CUDA device it runs a tiny size, to show that it runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks import measure
from benchmarks.kernels.blocks import CUDA, DEVICE, device_ms
from trl_turbo.kernels.gated import gated_forward
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.kernels.skinny import Workspace, skinny_gated, skinny_linear, tiles
from trl_turbo.kernels.skinny.reference import skinny_gated_reference, skinny_linear_reference

DTYPE = torch.bfloat16
#: Hidden size and columns of the MLP.
MODELS = {"Qwen2.5-1.5B": (1536, 8960), "Llama-3.1-8B": (4096, 14336)} if CUDA else {"tiny": (64, 160)}
ROWS = (8, 16)
OPS = ("gate_up", "down")
#: Weights of one kind in a graph, and how often it goes through them: a replay begins once for all.
LAYERS, REPEATS = (28, 4) if CUDA else (2, 1)

Call = Callable[[], torch.Tensor]


def weights(op: str, hidden: int, inner: int) -> list[torch.Tensor]:
    """[2 * I, H] or [H, I], one for each layer."""
    shape = (2 * inner, hidden) if op == "gate_up" else (hidden, inner)
    return [torch.randn(shape, device=DEVICE).mul_(0.02).to(DTYPE) for _ in range(LAYERS)]


def ours(op: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return skinny_gated(x, weight, "silu") if op == "gate_up" else skinny_linear(x, weight)


def in_torch(op: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As vLLM's `SiluAndMul.forward_native`, where an activation follows."""
    both = x @ weight.T
    if op == "down":
        return both
    half = both.shape[-1] // 2
    return functional.silu(both[..., :half]) * both[..., half:]


def with_our_activation(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Two kernels: cuBLAS's, and one for the activation."""
    return gated_forward(*(x @ weight.T).chunk(2, -1), "silu")


def with_vllm_activation(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Two kernels: cuBLAS's, and vLLM's."""
    both = x @ weight.T
    out = torch.empty(x.shape[0], weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    torch.ops._C.silu_and_mul(out, both)
    return out


@functools.cache
def has_vllm() -> bool:
    if not CUDA:
        return False
    try:
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        with_vllm_activation(torch.ones(1, 16, device=DEVICE), torch.ones(32, 16, device=DEVICE))
    except Exception as error:  # other versions have it elsewhere
        print(f"without vLLM's activation: {type(error).__name__}: {error}")
        return False
    return True


def contestants(op: str) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    found: dict[str, Any] = {"trl_turbo": partial(ours, op), "torch": partial(in_torch, op)}
    if op == "gate_up":
        found["torch, our activation"] = with_our_activation
        if has_vllm():
            found["torch, vLLM's activation"] = with_vllm_activation
    return found


def excess(op: str, found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """See `excess_error`; above 1 is wrong."""
    wide = x.double(), weight.double()
    if op == "gate_up":
        plain, truth = skinny_gated_reference(x, weight, "silu"), skinny_gated_reference(*wide, "silu")
    else:
        plain, truth = skinny_linear_reference(x, weight), skinny_linear_reference(*wide)
    return excess_error(found, plain, truth)


def check(op: str, call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, w: torch.Tensor) -> str:
    """What is wrong with a contestant, in words; nothing where it is right."""
    found = call(x, w)
    error = excess(op, found, x, w)
    if not error <= 1:  # NaN, too
        return f"{op} is {error:.2f} times as far from float64 as plain torch may be"
    if not torch.equal(found, call(x, w)):
        return f"{op} gives other bits the second time"
    return ""


def graph_of(calls: list[Call]) -> tuple[Callable[[], object], torch.Tensor]:
    """What runs all of them REPEATS times, and where the last one's result lies; outside of it the first runs once."""
    if not CUDA:
        kept = [call() for call in calls]
        return lambda: [call() for call in calls], kept[-1]
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            for call in calls:
                last = call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, last


def replayed(
    name: str, call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, made: list[torch.Tensor]
) -> tuple[Callable[[], object], str]:
    """A graph of all layers, and what is wrong with it, in words."""
    replay, last = graph_of([partial(call, x, weight) for weight in made])
    wanted = call(x, made[-1])
    for _ in range(3):
        if CUDA:
            last.fill_(torch.nan)
        replay()
        if not torch.equal(last, wanted):
            return replay, f"{name} gives other bits in a replayed graph"
    return replay, ""


def layer_ms(replay: Callable[[], object]) -> float:
    """Time of a layer in one replay, whose beginning is hidden behind a sleeping kernel."""
    return device_ms([replay], 1)[0] / (LAYERS * REPEATS)


def bench(model: str, op: str, m: int, made: list[torch.Tensor], rounds: int) -> dict[str, Any]:
    x = torch.randn(m, made[0].shape[1], device=DEVICE).to(DTYPE)
    replays = {}
    for name, call in contestants(op).items():
        wrong = check(op, call, x, made[0]) if name == "trl_turbo" else ""
        if not wrong:
            replays[name], wrong = replayed(name, call, x, made)
        if wrong and name == "trl_turbo":
            raise SystemExit(f"Wrong results are not timed: {wrong}.")
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds):
        for name, replay in replays.items():
            times[name].append(layer_ms(replay))
    timings = {}
    for name, found in times.items():
        found.sort()
        timings[name] = {
            "median_ms": round(statistics.median(found), 6),
            "low_ms": round(found[len(found) // 10], 6),
            "high_ms": round(found[-1 - len(found) // 10], 6),
        }
    n, k = made[0].shape
    nbytes = made[0].nbytes
    tile = usual(op, m, made[0])
    print(f"\n  {model} {op}: x {m} x {k:,}, weight {n:,} x {k:,}, {tile}")
    for name, timing in timings.items():
        print(f"    {name:<26}{timing['median_ms'] * 1e3:>9.2f} us{nbytes / timing['median_ms'] / 1e6:>9,.0f} GB/s")
    return {
        "model": model,
        "op": op,
        "m": m,
        "shape": [n, k],
        "bytes": nbytes,
        "gbps": round(nbytes / timings["trl_turbo"]["median_ms"] / 1e6, 1),
        "tile": str(tile),
        "timings": timings,
    }


def processors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count if CUDA else tiles.PROCESSORS


def usual(op: str, m: int, weight: torch.Tensor) -> tiles.Tile:
    n, k = weight.shape
    if op == "gate_up":
        return tiles.gated_tile(m, n // 2, k, processors())
    return tiles.linear_tile(m, n, k, processors())


def by_tile(op: str, tile: tiles.Tile, scratch: Workspace, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from trl_turbo.kernels.skinny.kernel import skinny_gated_triton, skinny_linear_triton

    if op == "gate_up":
        return skinny_gated_triton(x, weight, "silu", tile)
    made = scratch.of(x.device, len(weight), tile.split) if tile.split > 1 else None
    return skinny_linear_triton(x, weight, None, tile, made)


def other_tiles(model: str, op: str, m: int, made: list[torch.Tensor], rounds: int) -> dict[str, Any]:
    """Times of tiles that could be the kernel's, the fastest first."""
    x = torch.randn(m, made[0].shape[1], device=DEVICE).to(DTYPE)
    n, k = made[0].shape
    kind, n = ("gated", n // 2) if op == "gate_up" else ("linear", n)
    scratch = Workspace()
    found: list[tuple[float, tiles.Tile]] = []
    failed = {}
    for tile in tiles.candidates(kind, m, n, k, processors()):
        call = partial(by_tile, op, tile, scratch)
        try:
            wrong = check(op, call, x, made[0])
            if not wrong:
                replay, wrong = replayed(op, call, x, made)
        except Exception as error:  # one tile more or less: of shared memory there may be too little for it
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if wrong:
            failed[str(tile)] = wrong
            print(f"    {tile}: {wrong}", flush=True)
        else:
            found.append((statistics.median(layer_ms(replay) for _ in range(rounds)), tile))
            del replay
    found.sort(key=lambda pair: pair[0])
    print(f"\n  {model} {op}, {m} rows, {len(found)} tiles:")
    for median_ms, tile in found[:12]:
        gbps = made[0].nbytes / median_ms / 1e6
        used = " (used)" if tile == usual(op, m, made[0]) else ""
        print(f"    {median_ms * 1e3:8.2f} us {gbps:7,.0f} GB/s  {tile}{used}", flush=True)
    if found:
        print(f'    ("{kind}", {m}, {n}, {k}): {found[0][1]},', flush=True)
    listed = [{"tile": str(tile), "median_ms": round(median_ms, 6)} for median_ms, tile in found]
    return {"model": model, "op": op, "m": m, "shape": list(made[0].shape), "tiles": listed, "failed": failed}


def picture(results: list[dict[str, Any]], card: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    names = list(dict.fromkeys(name for row in results for name in row["timings"]))
    of = {name: [row["timings"].get(name, {}).get("median_ms") for row in results] for name in names}
    speeds = {
        name: [None if ms is None else row["bytes"] / ms / 1e6 for row, ms in zip(results, of[name], strict=True)]
        for name in names
    }
    for name, bars in measure.grouped_bars(axis, speeds).items():
        axis.bar_label(bars, [f"{ms * 1e3:.1f}" for ms in of[name] if ms is not None], fontsize=6)
    axis.set_xticks(range(len(results)), [f"{row['model']}\n{row['op']}, {row['m']} rows" for row in results])
    axis.tick_params(axis="x", labelsize=6)
    axis.set_ylabel("GB/s of the weight (labels: us)")
    axis.legend(fontsize=7)
    figure.suptitle(f"Layers of a decode step in a CUDA graph, {card}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    parser.add_argument("--rounds", type=int, default=21 if CUDA else 3)
    parser.add_argument("--tiles", action="store_true", help="then time other tiles")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args()
    torch.manual_seed(0)
    about = measure.environment(("triton", "vllm"))
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    for model in args.models:
        for op in OPS:
            made = weights(op, *MODELS[model])
            results += [bench(model, op, m, made, args.rounds) for m in ROWS]
            del made
    if args.out is not None:
        data = {"environment": about, "results": results}
        measure.write(args.out, data, lambda path: picture(results, about["card"], path))
    if not (args.tiles and CUDA):
        return
    found: list[dict[str, Any]] = []
    for model in args.models:
        for op in OPS:
            made = weights(op, *MODELS[model])
            for m in ROWS:
                found.append(other_tiles(model, op, m, made, max(3, args.rounds // 3)))
                if args.out is not None:  # after each, as a run may be cut short
                    data = {"environment": about, "results": found}
                    args.out.with_name(f"{args.out.name}_tiles.json").write_text(json.dumps(data, indent=1) + "\n")
            del made


if __name__ == "__main__":
    main()
