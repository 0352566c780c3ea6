"""Folding an adapter into its base and taking it out again, against plain torch and PEFT's merge and unmerge.

    python -m benchmarks.kernels.lora_fold --out benchmarks/results/lora_fold

Checks first that every weight comes back to the bit, and refuses to time a wrong kernel. Writes OUT.json and OUT.png.
`--tiles` times other tiles too. Without a CUDA device it runs tiny sizes, to show that it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from trl_turbo.engine.merged import Fold
from trl_turbo.kernels.lora_fold import LoraLayer, reference, table

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16
RANK = 16
STD = 0.02
# What the adapter adds, as a share of a weight's spread: early in a training run, and late
SHARES = (0.003, 0.03)
# Reads and writes of the weights that are needed: count reads, fold and restore read and write
PASSES = 5
BAR_MS = {"Qwen2.5-1.5B": 15.0}
TILES = ((64, 128, 8), (64, 64, 4), (32, 64, 4), (32, 128, 8), (128, 128, 8), (128, 128, 16))
Shapes = dict[str, tuple[int, int]]


def block(hidden: int, key_value: int, inner: int) -> Shapes:
    """Linears of a decoder's block, [out, in]."""
    square, narrow, up = (hidden, hidden), (key_value, hidden), (inner, hidden)
    shapes = {"q": square, "k": narrow, "v": narrow, "o": square, "gate": up, "up": up}
    return shapes | {"down": (hidden, inner)}


MODELS: dict[str, tuple[int, Shapes]] = (
    {"Qwen2.5-1.5B": (28, block(1536, 256, 8960)), "Llama-3.1-8B": (32, block(4096, 1024, 14336))}
    if CUDA
    else {"tiny": (2, block(64, 16, 160))}
)


def peft_layers(blocks: int, shapes: Shapes, share: float) -> dict[str, Any]:
    """PEFT's LoRA layers on linears [out, in], by name; adapters in float32, as PEFT makes them."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.Module()
    with torch.device(DEVICE):
        for index in range(blocks):
            for name, (outputs, inputs) in shapes.items():
                linear = nn.Linear(inputs, outputs, bias=False, dtype=DTYPE)
                nn.init.normal_(linear.weight, std=STD)
                model.add_module(f"{name}_{index}", linear)
    names = [name for name, _ in model.named_children()]
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)).to(DEVICE)
    layers = {name: module for name, module in peft.named_modules() if "default" in getattr(module, "lora_A", {})}
    for layer in layers.values():
        nn.init.normal_(layer.lora_A["default"].weight)
        nn.init.normal_(layer.lora_B["default"].weight, std=share * STD / (2 * RANK**0.5))
    return layers


def base(layers: dict[str, Any]) -> list[torch.Tensor]:
    return [layer.get_base_layer().weight.data for layer in layers.values()]


def bits_changed(layers: dict[str, Any], before: list[torch.Tensor]) -> int:
    """Weights that are not what they were."""
    pairs = zip(base(layers), before, strict=True)
    return sum(int((now.view(torch.int16) != old.view(torch.int16)).sum()) for now, old in pairs)


def check(layers: dict[str, Any], before: list[torch.Tensor], fold: Fold) -> None:
    for _ in range(3):
        fold.fold()
        same = sum(int(torch.equal(now, old)) for now, old in zip(base(layers), before, strict=True))
        fold.restore()
        changed = bits_changed(layers, before)
        if same or changed:
            raise SystemExit(
                f"Wrong results are not timed: {same} layers were not folded, {changed} weights not restored."
            )


def contestants(layers: dict[str, Any], fold: Fold) -> dict[str, Callable[[], object]]:
    """Each folds once and restores once."""
    plain = [
        LoraLayer(
            layer.get_base_layer().weight.data,
            layer.lora_A["default"].weight.data,
            layer.lora_B["default"].weight.data,
            layer.scaling["default"],
        )
        for layer in layers.values()
    ]

    def ours() -> None:
        fold.fold()
        fold.restore()

    def in_torch() -> None:
        reference.fold(plain, 0.25).restore()

    def peft() -> None:
        for layer in layers.values():
            layer.merge()
        for layer in layers.values():
            layer.unmerge()

    return {"trl_turbo": ours, "torch": torch.no_grad()(in_torch), "peft": torch.no_grad()(peft)}


def phases(fold: Fold, rounds: int) -> dict[str, float]:
    """Medians of the two halves."""
    times: dict[str, list[float]] = {"fold_ms": [], "restore_ms": []}
    for _ in range(rounds):
        times["fold_ms"].append(measure.one_ms(fold.fold))
        times["restore_ms"].append(measure.one_ms(fold.restore))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def copy_gbps(rounds: int) -> float:
    """Bytes read and written a second by a copy, the best of some."""
    source = torch.ones((1 << 30) if CUDA else (1 << 20), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / min(measure.one_ms(lambda: target.copy_(source)) for _ in range(rounds)) / 1e6


def bench(model: str, share: float, rounds: int, tiles: bool) -> dict[str, Any]:
    blocks, shapes = MODELS[model]
    layers = peft_layers(blocks, shapes, share)
    before = [weight.clone() for weight in base(layers)]
    weight_bytes = sum(weight.nbytes for weight in before)
    fold = Fold.of_peft(layers, "default")
    check(layers, before, fold)
    print(f"\n{model}: {len(layers)} layers, {weight_bytes / 1e9:.2f} GB, the adapter adds {share:.1%} of the spread")
    halves = phases(fold, rounds)
    changed = bits_changed(layers, before)
    if changed:
        raise SystemExit(f"Wrong results are not timed: {changed} weights were not restored.")
    timings = measure.interleaved(contestants(layers, fold), rounds)
    drifted = bits_changed(layers, before)  # PEFT's doing, as ours was just checked
    ours, copy = timings["trl_turbo"], copy_gbps(rounds)
    gbps = PASSES * weight_bytes / ours.median_ms / 1e6
    print(
        f"  log {fold.log_bytes / weight_bytes:.2%} of the weights; fold {halves['fold_ms']:.2f} ms, restore ", end=""
    )
    print(f"{halves['restore_ms']:.2f} ms; {gbps:.0f} GB/s, a copy {copy:.0f} GB/s")
    for name, timing in timings.items():
        ratio = timing.median_ms / ours.median_ms
        print(f"    {name:<10}{timing.median_ms:>9.2f} ms{ratio:>9.1f}x{timing.extra_mib:>9.0f} MiB extra")
    print(f"    PEFT changed {drifted:,} weights for good")
    if model in BAR_MS:
        print(f"    at most {BAR_MS[model]} ms: {ours.median_ms <= BAR_MS[model]}")
    if tiles:
        other_tiles(fold, rounds)
    return {"model": model, "layers": len(layers), "weight_bytes": weight_bytes, "adapter_share": share} | {
        "log_bytes": fold.log_bytes,
        "bar_ms": BAR_MS.get(model),
        **{name: round(value, 4) for name, value in halves.items()},
        "gbps": round(gbps, 1),
        "copy_gbps": round(copy, 1),
        "peft_changed": drifted,
        "weights": weight_bytes // DTYPE.itemsize,
        "timings": measure.as_rows(timings),
    }


def other_tiles(fold: Fold, rounds: int) -> None:
    """Times of tiles that could be `kernel.TILE`."""
    from trl_turbo.kernels.lora_fold import kernel

    usual = kernel.TILE
    if usual not in (table.Tile(*sides) for sides in TILES):
        raise SystemExit(f"{usual} is not among the tiles to try")
    layers = fold._now()
    for sides in TILES:
        tile = table.Tile(*sides)
        times = []
        for _ in range(rounds + 1):
            folded: list[Any] = []
            fold_ms = measure.one_ms(partial(_append, folded, partial(kernel.fold, layers, 0.25, tile)))
            times.append((fold_ms, measure.one_ms(folded[0].restore)))
        print(f"    {tile}: fold {min(t[0] for t in times):.2f} ms, restore {min(t[1] for t in times):.2f} ms")


def _append(found: list[Any], run: Callable[[], Any]) -> None:
    found.append(run())


def picture(results: list[dict[str, Any]], card: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    medians = {name: [row["timings"][name]["median_ms"] for row in results] for name in results[0]["timings"]}
    for bars in measure.grouped_bars(axis, medians).values():
        axis.bar_label(bars, fmt="%.1f", fontsize=7)
    axis.set_yscale("log")
    axis.set_xticks(
        range(len(results)), [f"{row['model']}\nadds {row['adapter_share']:.1%} of the spread" for row in results]
    )
    axis.set_ylabel("fold + restore, ms")
    axis.legend(fontsize=7)
    figure.suptitle(f"An adapter of rank {RANK} into the bf16 base and out again, {card}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    parser.add_argument("--rounds", type=int, default=15 if CUDA else 3)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tiles", action="store_true", help="time other tiles too")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    about = measure.environment(("triton", "peft"))
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    for model in args.models:
        for share in SHARES:
            results.append(bench(model, share, args.rounds, args.tiles and CUDA))
            if CUDA:
                torch.cuda.empty_cache()
    if args.out is not None:
        data = {"environment": about, "results": results}
        measure.write(args.out, data, lambda path: picture(results, about["card"], path))


if __name__ == "__main__":
    main()
