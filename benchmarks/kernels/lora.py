"""Linears with LoRA, the projections of attention and the gated MLP, against PEFT's layers in transformers' code.

    python -m benchmarks.kernels.lora --out benchmarks/results/lora

Checks results and gradients first, and refuses to time wrong ones. Times forward, backward and both; counts what is
kept between them. Writes OUT.json and OUT.png. Without a CUDA device it runs tiny sizes, to show that it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.kernels.lora import lora_linear, lora_mlp, lora_qkv
from trl_turbo.patches.lora.plan import projection

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16
SLACK = 0.1
SPEED_BAR = 1.2
BYTES_BAR = 0.6
RANKS = (16, 64) if CUDA else (4,)
TOKENS = (4096, 32768) if CUDA else (64,)
#: Hidden size -> keys and values, and the MLP's inner size: Qwen2.5-1.5B and Llama 3.1 8B
SHAPES = {1536: (256, 8960), 4096: (1024, 14336)} if CUDA else {64: (32, 160)}
BASES = ("bf16", "nf4")
BLOCKS = ("mlp", "qkv", "o")


class Block(nn.Module):
    """Linears, and how transformers' code calls them."""

    def __init__(self, kind: str, hidden: int, base: str) -> None:
        super().__init__()
        narrow, inner = SHAPES[hidden]
        shapes = {
            "mlp": {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)},
            "qkv": {"q_proj": (hidden, hidden), "k_proj": (narrow, hidden), "v_proj": (narrow, hidden)},
            "o": {"o_proj": (hidden, hidden)},
        }[kind]
        self.kind = kind
        for name, (outputs, inputs) in shapes.items():
            self.add_module(name, linear(outputs, inputs, base))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs for x [N, in], by PEFT and transformers."""
        if self.kind == "mlp":
            return (self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)),)
        return tuple(layer(x) for layer in self.children())


def linear(outputs: int, inputs: int, base: str) -> nn.Module:
    """A frozen linear, [out, in], in bf16 or in bitsandbytes' double-quantised nf4."""
    with torch.device(DEVICE):
        dense = nn.Linear(inputs, outputs, bias=False, dtype=DTYPE)
    nn.init.normal_(dense.weight, std=0.02)
    if base == "bf16":
        return dense
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(inputs, outputs, False, DTYPE, compress_statistics=True, quant_type="nf4")
    made.to(DTYPE)  # its values dequantise to what they were when they were quantised, as in a loaded model
    made.load_state_dict(dense.state_dict())
    return made.to(DEVICE)


def adapted(kind: str, hidden: int, rank: int, base: str) -> Block:
    """The block with PEFT's layers; adapters in float32 as PEFT makes them, over nf4 in bf16 as TRL casts them."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    block = Block(kind, hidden, base)
    block.is_loaded_in_4bit, block.is_loaded_in_8bit = base == "nf4", False
    names = [name for name, _ in block.named_children()]
    peft = get_peft_model(block, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)).to(DEVICE).train()
    for layer in peft.base_model.model.children():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        nn.init.normal_(a, std=a.shape[1] ** -0.5)
        nn.init.normal_(b, std=0.1 * rank**-0.5)
        for weight in (a, b):
            weight.data = weight.data.to(torch.float32 if base == "bf16" else DTYPE)
    return peft.base_model.model


def ours(block: Block, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same through our functions, planned at each call as the patch does."""
    first = list(block.children())
    if block.kind == "mlp":
        gate, up = (projection(layer, x.dtype, x.device) for layer in first[:2])
        return (lora_mlp(x, gate, up, projection(first[2], gate.result, x.device), "silu"),)
    found = [projection(layer, x.dtype, x.device) for layer in first]
    return lora_qkv(x, *found) if len(found) > 1 else (lora_linear(x, found[0]),)


Run = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def autocast() -> Any:
    """As a trainer with bf16=True runs."""
    return torch.autocast(DEVICE, DTYPE)


def leaves(block: nn.Module) -> list[torch.Tensor]:
    return [p for p in block.parameters() if p.requires_grad]


def outcome(run: Run, x: torch.Tensor, grads: list[torch.Tensor], block: nn.Module, *, plain: bool = False) -> Any:
    """Outputs and all gradients."""
    with nullcontext() if plain else autocast():
        outputs = run(x)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, (x, *leaves(block)), grads)]


def exactly(block: Block, x: torch.Tensor, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """The truth in float32, with the weights that the base stands for."""
    twin = nn.Module()
    for name, layer in block.named_children():
        base = layer.get_base_layer()
        weight = base.weight
        if hasattr(weight, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight.data, weight.quant_state)
        part = nn.Module()
        part.register_buffer("weight", weight.detach().float())
        part.lora_A = nn.Parameter(layer.lora_A["default"].weight.detach().float())
        part.lora_B = nn.Parameter(layer.lora_B["default"].weight.detach().float())
        part.scaling = layer.scaling["default"]
        twin.add_module(name, part)

    def through(part: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ part.weight.t() + x @ part.lora_A.t() @ part.lora_B.t() * part.scaling

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = list(twin.children())
        if block.kind == "mlp":
            return (through(parts[2], nn.functional.silu(through(parts[0], x)) * through(parts[1], x)),)
        return tuple(through(part, x) for part in parts)

    x = x.detach().float().requires_grad_()
    return outcome(run, x, [grad.float() for grad in grads], twin, plain=True)


def check(block: Block, hidden: int) -> float:
    """The largest error as a share of what is allowed, on some rows.

    Raises:
        SystemExit: It is more than that.
    """
    rows = 512 if CUDA else 48
    x, grads = numbers(block, hidden, rows)
    worst = 0.0
    found, stock = outcome(partial(ours, block), x, grads, block), outcome(block, x, grads, block)
    for mine, theirs, true in zip(found, stock, exactly(block, x, grads), strict=True):
        if mine.dtype != theirs.dtype or not mine.isfinite().all():
            raise SystemExit(
                f"Wrong results are not timed: {mine.dtype} where stock gives {theirs.dtype}, or not finite."
            )
        worst = max(worst, excess_error(mine, theirs, true, SLACK + 3 / true.numel() ** 0.5))
    if worst > 1:
        raise SystemExit(f"Wrong results are not timed: {block.kind} is off by {worst:.2f} of what is allowed.")
    return worst


def numbers(block: Block, hidden: int, rows: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x = torch.randn(rows, hidden, device=DEVICE, dtype=DTYPE).requires_grad_()
    with torch.no_grad(), autocast():
        grads = [torch.randn_like(y) for y in block(x)]  # also lets a 4-bit base choose its dtype
    return x, grads


def kept_mib(run: Run, x: torch.Tensor) -> float:
    """What stays allocated between forward and backward beyond the outputs."""
    if not CUDA:
        return 0.0
    with autocast():
        run(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        outputs = run(x)
        torch.cuda.synchronize()
    after = torch.cuda.memory_allocated()
    return (after - before - sum(y.nbytes for y in outputs)) / 2**20


def bench(kind: str, hidden: int, tokens: int, rank: int, base: str, rounds: int) -> dict[str, Any]:
    block = adapted(kind, hidden, rank, base)
    error = check(block, hidden)
    x, grads = numbers(block, hidden, tokens)
    runs: dict[str, Run] = {"trl_turbo": partial(ours, block), "peft": block}
    wanted = (x, *leaves(block))
    row: dict[str, Any] = {"block": kind, "h": hidden, "n": tokens, "rank": rank, "base": base}
    row["excess_error"] = round(error, 4)
    row["kept_mib"] = {name: round(kept_mib(run, x), 2) for name, run in runs.items()}

    def forward(run: Run) -> tuple[torch.Tensor, ...]:
        with autocast():
            return run(x)

    def both(run: Run) -> None:
        torch.autograd.grad(forward(run), wanted, grads)

    graphs = {name: forward(run) for name, run in runs.items()}

    def backward(name: str) -> None:
        torch.autograd.grad(graphs[name], wanted, grads, retain_graph=True)

    row["forward"] = measure.as_rows(measure.interleaved({n: partial(forward, r) for n, r in runs.items()}, rounds))
    row["backward"] = measure.as_rows(measure.interleaved({n: partial(backward, n) for n in runs}, rounds))
    graphs.clear()
    row["both"] = measure.as_rows(measure.interleaved({n: partial(both, r) for n, r in runs.items()}, rounds))
    ratio = {phase: row[phase]["peft"]["median_ms"] / row[phase]["trl_turbo"]["median_ms"] for phase in PHASES}
    row["bar"] = {"speed": SPEED_BAR, "bytes": BYTES_BAR}
    kept = row["kept_mib"]
    print(
        f"  {kind:<4} H {hidden:>5} N {tokens:>6} r {rank:>3} {base:<5}"
        + "".join(
            f"{phase:>10} {row[phase]['trl_turbo']['median_ms']:>8.3f} ms {ratio[phase]:>5.2f}x" for phase in PHASES
        )
        + f"   kept {kept['trl_turbo']:>8.1f} of {kept['peft']:>8.1f} MiB"
    )
    return row


PHASES = ("forward", "backward", "both")


def verdict(results: list[dict[str, Any]]) -> None:
    """Say which bars are missed."""
    for row in results:
        name = f"{row['block']} H {row['h']} N {row['n']} r {row['rank']} {row['base']}"
        for phase in PHASES:
            ratio = row[phase]["peft"]["median_ms"] / row[phase]["trl_turbo"]["median_ms"]
            bar = SPEED_BAR if phase == "both" else 1.0
            if ratio < bar:
                print(f"  missed: {name} {phase} {ratio:.2f}x, the bar is {bar}x")
        if row["kept_mib"]["trl_turbo"] > BYTES_BAR * row["kept_mib"]["peft"]:
            print(f"  missed: {name} keeps {row['kept_mib']}")


def picture(results: list[dict[str, Any]], card: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(BLOCKS), figsize=(13, 4.2), layout="constrained", sharey=True)
    for axis, kind in zip(axes, BLOCKS, strict=True):
        rows = [row for row in results if row["block"] == kind]
        for k, phase in enumerate(PHASES):
            ratios = [row[phase]["peft"]["median_ms"] / row[phase]["trl_turbo"]["median_ms"] for row in rows]
            axis.bar([i + (k - 1) * 0.27 for i in range(len(rows))], ratios, 0.27, label=phase)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(
            range(len(rows)),
            [f"{row['h']}, {row['n']}, r{row['rank']}, {row['base']}" for row in rows],
            rotation=90,
            fontsize=6,
        )
        axis.set_title(kind)
    axes[0].set_ylabel("PEFT's time / ours")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"LoRA over a frozen base under bf16 autocast, {card}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    parser.add_argument("--rounds", type=int, default=15 if CUDA else 2)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    args = parser.parse_args()
    bases = [base for base in args.bases if base != "nf4" or importlib.util.find_spec("bitsandbytes") is not None]
    about = measure.environment(("triton", "peft", "transformers", "bitsandbytes"))
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    for kind in args.blocks:
        for hidden in SHAPES:
            for base in bases:
                for rank in RANKS:
                    for tokens in TOKENS:
                        results.append(bench(kind, hidden, tokens, rank, base, args.rounds))
                        if CUDA:
                            torch.cuda.empty_cache()
    verdict(results)
    if args.out is not None:
        data = {"environment": about, "results": results}
        measure.write(args.out, data, lambda path: picture(results, about["card"], path))


if __name__ == "__main__":
    main()
