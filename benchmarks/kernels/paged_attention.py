"""Attention of a decode step over a paged cache, in one launch, against what vLLM launches for it.

    python -m benchmarks.kernels.paged_attention --out benchmarks/results/paged_attention

Checks the result and the cache first, and refuses to time a wrong kernel. Then a CUDA graph with the layers of a model,
each with a cache of its own: the time of a replay over its layers. Beside it, where vLLM is installed: its rotary
embedding, its write to the cache, and FlashAttention 3 with the work split ahead as in vLLM's own graphs (splitting is
not timed). Writes OUT.json and OUT.png; `--tiles` times other tiles too. Without a CUDA device it runs a tiny size.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from trl_turbo.engine.decode_race import replays
from trl_turbo.kernels.paged_attention import Rotation, Step, kernel, paged_decode
from trl_turbo.kernels.paged_attention.reference import paged_decode_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16
#: Heads, heads of keys, head dim, layers: Qwen2.5-1.5B's and Llama-3.1-8B's.
MODELS = {"qwen2.5-1.5b": (12, 2, 128, 28), "llama3.1-8b": (32, 8, 128, 32)} if CUDA else {"tiny": (4, 2, 16, 2)}
LENGTHS = (200, 640, 4224, 16384) if CUDA else (20,)
ROWS = 8 if CUDA else 2
BLOCK = 16
#: Tokens, warps and stages; as keys are found through a table, Triton 3.6 reads them ahead from five stages on.
TILES = [kernel.Tile(tokens, warps, stages) for tokens in (32, 64, 128) for warps in (4, 8) for stages in (3, 5, 7)]


@dataclass
class Layer:
    """One layer's tensors: what its projections gave, and its cache [blocks, heads, block size, key and value]."""

    joined: torch.Tensor
    cache: torch.Tensor
    heads: int
    kv_heads: int
    dim: int

    def split(self) -> tuple[torch.Tensor, ...]:
        sizes = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim]
        return self.joined.split(sizes, dim=-1)

    def caches(self) -> tuple[torch.Tensor, ...]:
        return self.cache.transpose(1, 2).split(self.dim, dim=-1)


@dataclass
class Batch:
    """What all layers share."""

    table: torch.Tensor
    lens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    cos_sin: torch.Tensor


def made(model: str, length: int) -> tuple[list[Layer], Batch]:
    heads, kv_heads, dim, layers = MODELS[model]
    blocks = -(-length // BLOCK)
    table = torch.randperm(ROWS * blocks, device=DEVICE).view(ROWS, blocks).int()
    last = torch.full((ROWS,), length - 1, device=DEVICE)
    slots = table[:, (length - 1) // BLOCK].long() * BLOCK + (length - 1) % BLOCK
    angles = torch.arange(length, device=DEVICE)[:, None] / 1e4 ** torch.linspace(0, 1, dim // 2, device=DEVICE)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(DTYPE)
    lens = torch.full((ROWS,), length, dtype=torch.int32, device=DEVICE)
    batch = Batch(table, lens, slots, last, cos_sin)
    found = []
    for _ in range(layers):
        joined = torch.randn(ROWS, (heads + 2 * kv_heads) * dim, device=DEVICE).to(DTYPE)
        cache = torch.randn(ROWS * blocks, kv_heads, BLOCK, 2 * dim, device=DEVICE).to(DTYPE)
        found.append(Layer(joined, cache, heads, kv_heads, dim))
    return found, batch


def ours(layer: Layer, batch: Batch, length: int) -> torch.Tensor:
    query, key, value = (x.unflatten(-1, (-1, layer.dim)) for x in layer.split())
    return paged_decode(
        query,
        key,
        value,
        *layer.caches(),
        batch.table,
        batch.lens,
        batch.slots,
        scale=layer.dim**-0.5,
        rotation=Rotation(batch.cos_sin, batch.positions),
        length=length,
    )


def of_vllm() -> Callable[[Layer, Batch, int], Callable[[], torch.Tensor]] | None:
    """What makes a layer's step of vLLM's; `None` where there is no vLLM on a GPU with FlashAttention 3."""
    try:
        from vllm import _custom_ops
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, get_scheduler_metadata
    except ImportError:
        return None
    if not CUDA or torch.cuda.get_device_capability() != (9, 0):
        return None
    one = torch.ones((), device=DEVICE)

    def prepared(layer: Layer, batch: Batch, length: int) -> Callable[[], torch.Tensor]:
        query, key, value = layer.split()
        caches = layer.caches()
        starts = torch.arange(ROWS + 1, dtype=torch.int32, device=DEVICE)
        ahead = get_scheduler_metadata(
            ROWS,
            1,
            length,
            layer.heads,
            layer.kv_heads,
            layer.dim,
            batch.lens,
            cu_seqlens_q=starts,
            page_size=BLOCK,
            causal=True,
            num_splits=32,
        )

        def run() -> torch.Tensor:
            _custom_ops.rotary_embedding(batch.positions, query, key, layer.dim, batch.cos_sin, True)
            k, v = (x.unflatten(-1, (-1, layer.dim)) for x in (key, value))
            _custom_ops.reshape_and_cache_flash(k, v, *caches, batch.slots, "auto", one, one)
            return flash_attn_varlen_func(
                query.unflatten(-1, (-1, layer.dim)),
                *caches,
                max_seqlen_q=1,
                cu_seqlens_q=starts,
                max_seqlen_k=length,
                seqused_k=batch.lens,
                softmax_scale=layer.dim**-0.5,
                causal=True,
                block_table=batch.table,
                scheduler_metadata=ahead,
                num_splits=32,
                fa_version=3,
            )

        return run

    return prepared


def check(layer: Layer, batch: Batch, length: int) -> None:
    """Raise `SystemExit` where the result or the cache is further from the truth than two roundings."""
    before = layer.cache.clone()
    query, key, value = (x.double().unflatten(-1, (-1, layer.dim)) for x in layer.split())
    rotation = Rotation(batch.cos_sin.double(), batch.positions)
    exact = [x.double() for x in before.transpose(1, 2).split(layer.dim, dim=-1)]
    truth = paged_decode_reference(
        Step(query, key, value, *exact, batch.table, batch.lens, batch.slots, layer.dim**-0.5, rotation)
    )
    off = (ours(layer, batch, length).double() - truth).abs().max().item()
    ulp = torch.finfo(DTYPE).eps
    # Queries and keys are rounded, which moves a score by up to an ulp of it, and so are weights and the result
    bound = 8 * ulp * max(1.0, truth.abs().max().item())
    moved = max((a.double() - b).abs().max().item() for a, b in zip(layer.caches(), exact, strict=True))
    if not off <= bound or not moved <= 4 * ulp * before.abs().max().item():
        raise SystemExit(f"Wrong results are not timed: off by {off:.3g} of {bound:.3g}, the cache by {moved:.3g}.")


def replay_us(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Times of a graph of all of them over their number, in us, sorted."""
    if CUDA:
        return replays(runs, rounds)
    for run in runs:
        run()
    return [0.0]


def bench(model: str, length: int, rounds: int, tiles: bool) -> dict[str, Any]:
    layers, batch = made(model, length)
    check(layers[0], batch, length)
    contestants: dict[str, list[Callable[[], object]]] = {
        "trl_turbo": [lambda layer=layer: ours(layer, batch, length) for layer in layers]  # type: ignore[misc]
    }
    prepared = of_vllm()
    if prepared is not None:
        contestants["vllm"] = [prepared(layer, batch, length) for layer in layers]
    timings = {}
    print(f"\n  {model}, {ROWS} x {length:,}")
    for who, runs in contestants.items():
        found = replay_us(runs, rounds)
        timings[who] = {
            "median_us": round(statistics.median(found), 3),
            "low_us": round(found[len(found) // 10], 3),
            "high_us": round(found[-1 - len(found) // 10], 3),
        }
        print(f"    {who:<10}{timings[who]['median_us']:>8.2f} us a layer")
    if tiles:
        other_tiles(layers, batch, length, rounds)
    heads, kv_heads, dim, count = MODELS[model]
    shape = {"rows": ROWS, "length": length, "heads": heads, "kv_heads": kv_heads, "dim": dim, "layers": count}
    return {"model": model, **shape, "timings": timings}


def other_tiles(layers: list[Layer], batch: Batch, length: int, rounds: int) -> None:
    """Times of tiles that could be the kernel's."""
    pairs = ROWS * layers[0].kv_heads
    usual = kernel.tile_of(length // kernel.parts_of(pairs, layers[0].cache.device), layers[0].dim * DTYPE.itemsize)
    chosen = kernel.tile_of
    found = {}
    try:
        for tile in TILES:
            kernel.tile_of = lambda *_, tile=tile: tile
            check(layers[0], batch, length)
            runs: list[Callable[[], object]] = [
                lambda layer=layer: ours(layer, batch, length)
                for layer in layers  # type: ignore[misc]
            ]
            found[tile] = statistics.median(replay_us(runs, rounds))
    finally:
        kernel.tile_of = chosen
    for tile, median in sorted(found.items(), key=lambda each: each[1])[:6]:
        print(f"    {tuple(tile)}: {median:.2f} us{' (used)' if tile == usual else ''}")


def picture(results: list[dict[str, Any]], card: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    times = {name: [row["timings"][name]["median_us"] for row in results] for name in results[0]["timings"]}
    for name, bars in measure.grouped_bars(axis, times).items():
        axis.bar_label(bars, [f"{each:.1f}" for each in times[name]], fontsize=7)
    axis.set_xticks(range(len(results)), [f"{row['model']}\n{row['rows']} x {row['length']:,}" for row in results])
    axis.set_ylabel("us a layer")
    axis.legend(fontsize=7)
    figure.suptitle(f"Rotation, cache and attention of a decode step, {card}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    parser.add_argument("--rounds", type=int, default=51 if CUDA else 1)
    parser.add_argument("--tiles", action="store_true", help="time other tiles too")
    args = parser.parse_args()
    torch.manual_seed(0)
    about = measure.environment(("triton", "vllm"))
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    for model in MODELS:
        for length in LENGTHS:
            results.append(bench(model, length, args.rounds, args.tiles and CUDA))
            if CUDA:
                torch.cuda.empty_cache()
    if args.out is not None:
        measure.write(
            args.out,
            {"environment": about, "results": results},
            lambda path: picture(results, about["card"], path),
        )


if __name__ == "__main__":
    main()
