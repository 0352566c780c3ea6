"""All layers of a decode step in one CUDA graph: our kernels, with weights read ahead and without, and vLLM's.

    python -m benchmarks.kernels.decode_layers --out benchmarks/results/decode_layers

Our two are compared bit by bit first: reading ahead changes no result, and the kernels themselves are checked in their
own benchmarks. Norms are vLLM's in all of them. `--tune` times other amounts to read ahead, and other tiles of
attention. Without a CUDA device it runs a tiny size, with other norms, to show that it runs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks import measure
from benchmarks.kernels import paged_attention as attention
from benchmarks.kernels.paged_attention import CUDA, DEVICE, DTYPE, ROWS, Batch, replay_us
from benchmarks.kernels.skinny import has_vllm, with_vllm_activation
from trl_turbo.engine import decode_ahead
from trl_turbo.engine.decode_ahead import Ahead
from trl_turbo.kernels.paged_attention import Rotation, kernel, paged_decode
from trl_turbo.kernels.skinny import skinny_gated, skinny_linear

#: Hidden size, columns of the MLP, and layers; heads are `paged_attention`'s.
MODELS = {"qwen2.5-1.5b": (1536, 8960, 28), "llama3.1-8b": (4096, 14336, 12)} if CUDA else {"tiny": (64, 160, 2)}
LENGTHS = (200, 640) if CUDA else (20,)
#: Bytes beside attention and beside a product, in MiB, and shares of the L2.
AMOUNTS = [(a, p, s) for s in (0.25, 0.4, 0.6) for a, p in ((4, 4), (8, 4), (8, 8), (12, 8), (16, 8), (24, 16))]
#: Programs a processor, tokens, warps and stages of attention.
TILES = [(n, *tile) for n in (1, 2) for tile in ((64, 8, 3), (64, 8, 5), (32, 4, 5), (32, 8, 5), (64, 4, 5))]


@dataclass
class Layer:
    """One layer's weights and cache."""

    qkv: torch.Tensor
    bias: torch.Tensor
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    norm: torch.Tensor
    heads: attention.Layer

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        return self.qkv, self.o, self.gate_up, self.down


def made(model: str, length: int) -> tuple[list[Layer], Batch]:
    hidden, inner, count = MODELS[model]
    layers, batch = attention.made(model, length)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE).mul_(shape[-1] ** -0.5).to(DTYPE)

    found = []
    for heads in layers[:count]:
        wide, narrow = heads.heads * heads.dim, heads.joined.shape[1]
        norm = torch.ones(hidden, device=DEVICE, dtype=DTYPE)
        found.append(
            Layer(
                weight(narrow, hidden),
                weight(1, narrow)[0],
                weight(hidden, wide),
                weight(2 * inner, hidden),
                weight(hidden, inner),
                norm,
                heads,
            )
        )
    return found, batch


def normed(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x + residual, which stays in residual, and normed: by vLLM's kernel, where there is one, into x."""
    if has_vllm():
        torch.ops._C.fused_add_rms_norm(x, residual, weight, 1e-6)
        return x
    return functional.rms_norm(residual.add_(x), residual.shape[-1:], weight)


def ours(layer: Layer, batch: Batch, x: torch.Tensor, residual: torch.Tensor, ahead: Ahead) -> torch.Tensor:
    """The layer's kernels in place of what vLLM runs."""
    heads = layer.heads
    x = normed(x, residual, layer.norm)
    ahead.reads(layer.qkv)
    joined = skinny_linear(x, layer.qkv, layer.bias, ahead=ahead.take(decode_ahead.BESIDE_PRODUCT))
    sizes = [heads.heads * heads.dim, heads.kv_heads * heads.dim, heads.kv_heads * heads.dim]
    query, key, value = (part.unflatten(-1, (-1, heads.dim)) for part in joined.split(sizes, dim=-1))
    out = paged_decode(
        query,
        key,
        value,
        *heads.caches(),
        batch.table,
        batch.lens,
        batch.slots,
        scale=heads.dim**-0.5,
        rotation=Rotation(batch.cos_sin, batch.positions),
        ahead=ahead.take(decode_ahead.BESIDE_ATTENTION),
    )
    ahead.reads(layer.o)
    x = skinny_linear(out.flatten(-2), layer.o, ahead=ahead.take(decode_ahead.BESIDE_PRODUCT))
    x = normed(x, residual, layer.norm)
    ahead.reads(layer.gate_up)
    h = skinny_gated(x, layer.gate_up, "silu")
    ahead.reads(layer.down)
    return skinny_linear(h, layer.down, ahead=ahead.take(decode_ahead.BESIDE_PRODUCT))


class Steps:
    """A step through all layers, for each way to run it.

    Args:
        layers: Of a model.
        batch: What they share.
        length: Tokens in the cache.
    """

    def __init__(self, layers: list[Layer], batch: Batch, length: int) -> None:
        self._layers = layers
        self._batch = batch
        self._length = length
        hidden = layers[0].o.shape[0]
        self._first = torch.randn(ROWS, hidden, device=DEVICE).to(DTYPE)
        self._residual = torch.empty_like(self._first)
        self.out = torch.empty_like(self._first)

    def with_ahead(self, most: int | None = None) -> list[Callable[[], object]]:
        """Ours, one call a layer; `most` 0 reads nothing ahead."""
        weights = [weight for layer in self._layers for weight in layer.weights]
        ahead = Ahead.of(weights) if most is None else Ahead(weights, most)
        return self._chain(lambda layer, x: ours(layer, self._batch, x, self._residual, ahead))

    def of_vllm(self) -> list[Callable[[], object]] | None:
        """What vLLM launches, one call a layer; `None` where it is not there."""
        prepared = attention.of_vllm()
        if prepared is None or not has_vllm():
            return None
        attend = {id(layer): prepared(layer.heads, self._batch, self._length) for layer in self._layers}

        def run(layer: Layer, x: torch.Tensor) -> torch.Tensor:
            x = normed(x, self._residual, layer.norm)
            # Its attention reads what `made` gave: the same work, and the product before it is timed beside
            functional.linear(x, layer.qkv, layer.bias)
            out = attend[id(layer)]()
            x = normed(functional.linear(out.flatten(-2), layer.o), self._residual, layer.norm)
            return functional.linear(with_vllm_activation(x, layer.gate_up), layer.down)

        return self._chain(run)

    def _chain(self, run: Callable[[Layer, torch.Tensor], torch.Tensor]) -> list[Callable[[], object]]:
        held: list[torch.Tensor] = []

        def call(index: int) -> None:
            if index == 0:
                self._residual.copy_(self._first)
                held[:] = [self._first.clone()]
            held[0] = run(self._layers[index], held[0])
            if index == len(self._layers) - 1:
                self.out.copy_(held[0])

        return [lambda index=index: call(index) for index in range(len(self._layers))]  # type: ignore[misc]


def check(steps: Steps) -> None:
    """Raise `SystemExit` where reading ahead changes a bit."""
    found = []
    for most in (0, None):
        steps.out.fill_(torch.nan)
        replay_us(steps.with_ahead(most), 3)
        found.append(steps.out.clone())
    if not torch.equal(*found):  # NaN, too
        raise SystemExit("Wrong results are not timed: reading ahead gives other bits.")


def bench(model: str, length: int, rounds: int, tune: bool) -> dict[str, Any]:
    layers, batch = made(model, length)
    steps = Steps(layers, batch, length)
    check(steps)
    contestants = {"trl_turbo": steps.with_ahead(), "nothing read ahead": steps.with_ahead(0)}
    theirs = steps.of_vllm()
    if theirs is not None:
        contestants["vllm"] = theirs
    timings = {}
    print(f"\n  {model}, {ROWS} x {length:,}, {len(layers)} layers")
    for who, runs in contestants.items():
        found = replay_us(runs, rounds)
        timings[who] = {
            "median_us": round(statistics.median(found), 3),
            "low_us": round(found[len(found) // 10], 3),
            "high_us": round(found[-1 - len(found) // 10], 3),
        }
        print(f"    {who:<20}{timings[who]['median_us']:>8.2f} us a layer", flush=True)
    if tune:
        tuned(steps)
    return {"model": model, "rows": ROWS, "length": length, "layers": len(layers), "timings": timings}


def tuned(steps: Steps) -> None:
    """Times of other amounts, and of other tiles with the best of them."""
    found = {}
    for each in AMOUNTS:
        with amounts(*each):
            found[each] = statistics.median(replay_us(steps.with_ahead(), 15))
    best = sorted(found, key=lambda each: found[each])
    for each in best[:8]:
        amount, product, share = each
        print(f"    {amount} MiB beside attention, {product} beside a product, {share} of the L2: {found[each]:.2f} us")
    usual = kernel.PER_PROCESSOR, kernel.TOKENS, kernel.WARPS, kernel.STAGES
    times = {}
    try:
        for ahead, tile in itertools.product((best[0], (0, 0, 0.0)), TILES):
            kernel.PER_PROCESSOR, kernel.TOKENS, kernel.WARPS, kernel.STAGES = tile
            with amounts(*ahead):
                times[ahead, tile] = statistics.median(replay_us(steps.with_ahead(), 15))
    finally:
        kernel.PER_PROCESSOR, kernel.TOKENS, kernel.WARPS, kernel.STAGES = usual
    for (ahead, tile), time in sorted(times.items(), key=lambda each: each[1]):
        print(f"    {ahead} ahead, programs, tokens, warps, stages {tile}: {time:.2f} us", flush=True)


@contextmanager
def amounts(beside_attention: int, beside_product: int, share: float) -> Iterator[None]:
    """While open, so much is read ahead, in MiB and of the L2."""
    names = ("BESIDE_ATTENTION", "BESIDE_PRODUCT", "MOST_OF_L2")
    usual = [getattr(decode_ahead, name) for name in names]
    try:
        for name, value in zip(names, (beside_attention << 20, beside_product << 20, share), strict=True):
            setattr(decode_ahead, name, value)
        yield
    finally:
        for name, value in zip(names, usual, strict=True):
            setattr(decode_ahead, name, value)


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
    figure.suptitle(f"A layer of a decode step, {card}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    parser.add_argument("--rounds", type=int, default=51 if CUDA else 1)
    parser.add_argument("--only", choices=MODELS, help="this model alone")
    parser.add_argument("--tune", action="store_true", help="time other amounts and tiles too")
    args = parser.parse_args()
    torch.manual_seed(0)
    about = measure.environment(("triton", "vllm"))
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    with torch.inference_mode():
        for model in MODELS if args.only is None else (args.only,):
            for length in LENGTHS:
                results.append(bench(model, length, args.rounds, args.tune and CUDA))
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
