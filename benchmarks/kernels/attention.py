"""Attention over packed sequences against torch's own, padded where it must be.

    python -m benchmarks.kernels.attention --out benchmarks/results/attention
    python -m benchmarks.kernels.attention --tune

Checks first that the result and all gradients are no further from float64 than plain torch in the same dtype; a wrong
kernel is not timed. Then the device's time of the forward, the backward and both: plain causal sequences against the
flash and cuDNN backends of `scaled_dot_product_attention`; a batch of which 40 % is no padding against the same with
padding; and eight completions of one prompt against eight rows. Writes OUT.json and OUT.png. `--tune` ranks tiles
instead (see `attention_tune`). Without a CUDA device it runs tiny sizes.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import measure
from benchmarks.kernels.blocks import device_ms
from trl_turbo.kernels.attention import Segments, attention, dense
from trl_turbo.kernels.attention.reference import attend, mask_of
from trl_turbo.kernels.attention.spec import Spec
from trl_turbo.kernels.linear_logprob.reference import excess_error

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16
PHASES = ("forward", "backward", "both")
#: Runs behind one sleeping kernel.
REPEATS = 4
#: What `both` must reach: how often as fast as each peer.
BARS = {"flash": 1.0, "cudnn": 0.75, "padded": 1.8}
#: Heads, heads of keys, head dim: Qwen2.5-1.5B's and Llama-3.1-8B's.
SHAPES = [(12, 2, 128), (32, 8, 128)] if CUDA else [(4, 2, 16)]

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One batch: segments of a packed row, and the rows of tokens that stock code would make of it.

    Attributes:
        name: Its kind.
        segments: The packed row.
        rows: For each padded row its tokens' places in the packed row.
        peers: Whom to compare with.
    """

    name: str
    segments: Segments
    rows: list[list[int]]
    peers: tuple[str, ...]

    @property
    def padded(self) -> torch.Tensor:
        """Places in the packed row of each row's tokens, [B, L], -1 for padding at the end."""
        longest = max(len(row) for row in self.rows)
        return torch.tensor([row + [-1] * (longest - len(row)) for row in self.rows], device=DEVICE)


def plain(tokens: int) -> Case:
    return Case("plain", Segments.build([tokens], device=DEVICE), [list(range(tokens))], ("flash", "cudnn"))


def ragged(count: int, longest: int, filled: float) -> Case:
    """`count` sequences up to `longest` tokens, `filled` of the rectangle in all."""
    g = torch.Generator().manual_seed(0)
    share = torch.rand(count, generator=g) ** 1.5
    share[0] = 1.0
    for _ in range(50):  # the longest stays, the others are scaled to fill what is wanted
        rest = (filled * count - 1) / (share.sum() - 1)
        share[1:] = (share[1:] * rest).clamp(0.02, 1)
    lengths = [max(1, round(x * longest)) for x in share.tolist()]
    segments = Segments.build(lengths, device=DEVICE)
    rows = [list(range(start, start + n)) for start, n in zip(segments.starts, lengths, strict=True)]
    return Case("ragged", segments, rows, ("padded", "padded_causal"))


def shared(prompt: int, completion: int, count: int) -> Case:
    segments = Segments.build([prompt] + [completion] * count, [-1] + [0] * count, device=DEVICE)
    before = list(range(prompt))
    rows = [before + list(range(start, start + completion)) for start in segments.starts[1:]]
    return Case("shared", segments, rows, ("flash", "cudnn"))


def cases() -> list[Case]:
    if not CUDA:
        return [plain(70), ragged(4, 40, 0.4), shared(40, 20, 3)]
    return [plain(4096), plain(16384), ragged(16, 4096, 0.4), shared(2048, 512, 8)]


def inputs_of(case: Case, shape: tuple[int, int, int]) -> Tensors:
    """q, k, v and the gradient of the result, as views of one projection, as models give them."""
    heads, key_heads, width = shape
    fused = torch.randn(case.segments.total, heads + 2 * key_heads, width, device=DEVICE).to(DTYPE)
    grad = torch.randn(case.segments.total, heads, width, device=DEVICE).to(DTYPE)
    return (*fused.split([heads, key_heads, key_heads], 1), grad)


def check(case: Case, inputs: Tensors) -> float:
    """Excess error of the result and the gradients over plain torch's; above 1 is wrong, and nothing is timed then."""
    q, k, v, grad = inputs
    everything = []
    for deterministic in (False, True):  # the latter is never left to cuDNN
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = attention(*leaves, case.segments, deterministic=deterministic)
        everything.append([o.detach(), *torch.autograd.grad(o, leaves, grad)])
    mask, spec = mask_of(case.segments, None), Spec(1 / math.sqrt(q.shape[2]))
    group, worst = q.shape[1] // k.shape[1], 0.0
    for key_head in {0, k.shape[1] - 1}:  # with the queries' heads that read them: the first and the last of the tables
        heads = [slice(key_head * group, (key_head + 1) * group)] * 2 + [slice(key_head, key_head + 1)] * 2
        part = [x[:, i] for x, i in zip((q, grad, k, v), heads, strict=True)]
        wanted, by_torch = (by_head(part[0], *part[2:], part[1], mask, spec, dtype) for dtype in (torch.float64, DTYPE))
        slack = 0.1 if CUDA else 1.0  # tiny samples scatter
        for found in everything:
            mine = [x[:, i] for x, i in zip(found, heads, strict=True)]
            worst = max(worst, *(excess_error(*three, slack) for three in zip(mine, by_torch, wanted, strict=True)))
    return worst


def by_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor, spec: Spec, dtype: Any
) -> list[torch.Tensor]:
    """Result and gradients by plain torch, a head of queries at a time, as all scores at once would take too much."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    results = [torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, q, k, v)]
    for head in range(heads):
        places = (head, head, head // group, head // group)
        leaves = [x[:, i].to(dtype)[None].requires_grad_() for x, i in zip((q, k, v), places[1:], strict=True)]
        o = attend(*leaves, mask, spec)
        grads = torch.autograd.grad(o, leaves, grad[:, head].to(dtype)[None])
        for result, i, part in zip(results, places, (o.detach(), *grads), strict=True):
            result[:, i] += part[0]
    return [x.to(dtype) for x in results]


def ours(
    case: Case, inputs: Tensors, deterministic: bool = False
) -> tuple[Callable[[], torch.Tensor], Tensors, torch.Tensor]:
    """What runs the forward, its leaves, and the gradient that goes back."""
    q, k, v, grad = inputs
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    return lambda: attention(*leaves, case.segments, deterministic=deterministic), leaves, grad


def theirs(
    peer: str, case: Case, inputs: Tensors, gqa: bool
) -> tuple[Callable[[], torch.Tensor], Tensors, torch.Tensor]:
    """The same by torch, over rows: padded at the end, the mask as transformers makes it or none, which causal allows.

    Where a backend takes no `enable_gqa`, keys and values are repeated before, which is not timed.
    """
    places = case.padded
    rows = [x[places.clamp(min=0)].masked_fill((places < 0)[..., None, None], 0).transpose(1, 2) for x in inputs]
    group = inputs[0].shape[1] // inputs[1].shape[1]
    if not gqa:
        rows[1:3] = [x.repeat_interleave(group, 1) for x in rows[1:3]]
    leaves = tuple(x.detach().requires_grad_() for x in rows[:3])
    kwargs: dict[str, Any] = {"is_causal": True}
    if peer == "padded":
        length = places.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
        kwargs = {"attn_mask": causal & (places >= 0)[:, None, None, :]}
    if gqa and group > 1:
        kwargs["enable_gqa"] = True
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

    def run() -> torch.Tensor:
        if peer in backends and CUDA:
            with sdpa_kernel(backends[peer]):
                return functional.scaled_dot_product_attention(*leaves, **kwargs)
        return functional.scaled_dot_product_attention(*leaves, **kwargs)

    return run, leaves, rows[3]


def contestants(case: Case, inputs: Tensors) -> dict[str, tuple[Callable[[], torch.Tensor], Tensors, torch.Tensor]]:
    found = {"trl_turbo": ours(case, inputs)}
    if dense.serves(inputs[0], case.segments, Spec(1.0)):
        found["kernels"] = ours(case, inputs, deterministic=True)
    for peer in case.peers:
        # With a mask transformers repeats keys: with grouped ones torch would fall back to plain products
        for gqa in (False,) if peer == "padded" else (True, False):
            try:
                contestant = theirs(peer, case, inputs, gqa)
                run, leaves, grad = contestant
                torch.autograd.grad(run(), leaves, grad)
            except RuntimeError as error:
                print(f"    {peer}{'' if gqa else ', keys repeated'}: {str(error).splitlines()[0]}")
                continue
            found[peer] = contestant
            break
    return found


def phase_run(phase: str, run: Callable[[], torch.Tensor], leaves: Tensors, grad: torch.Tensor) -> Callable[[], object]:
    if phase == "forward":
        return run
    if phase == "both":
        return lambda: torch.autograd.grad(run(), leaves, grad)
    return partial(torch.autograd.grad, run(), leaves, grad, retain_graph=True)


def flops(case: Case, shape: tuple[int, int, int]) -> dict[str, float]:
    """Of two products forward and five backward, over what the packed row sees."""
    segments = case.segments
    seen = sum(n * (n + 1) / 2 + n * segments.before(i) for i, n in enumerate(segments.lengths))
    product = 2 * seen * shape[0] * shape[2]
    return {"forward": 2 * product, "backward": 5 * product, "both": 7 * product}


def bench(case: Case, shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    heads, key_heads, width = shape
    tokens, rows = case.segments.total, case.padded.shape
    print(f"\n  {case.name}  T = {tokens:,}  rows {list(rows)}  heads {heads}/{key_heads}  D = {width}")
    inputs = inputs_of(case, shape)
    excess = check(case, inputs)
    print(f"    error over the allowed: {excess:.3f}")
    if not excess <= 1:
        raise SystemExit(f"Wrong results are not timed: {case.name}'s error is {excess:.2f} of the allowed.")
    row = {"case": case.name, "tokens": tokens, "rows": list(rows), "heads": heads, "key_heads": key_heads, "d": width}
    row |= {"filled": sum(len(x) for x in case.rows) / rows.numel(), "excess_error": excess}
    work = flops(case, shape)
    runs = contestants(case, inputs)
    for phase in PHASES:
        timings = {}
        for who, (run, leaves, grad) in runs.items():
            times = device_ms([phase_run(phase, run, leaves, grad)] * (REPEATS if CUDA else 1), rounds)
            timings[who] = {
                "median_ms": round(statistics.median(times), 5),
                "low_ms": round(times[len(times) // 10], 5),
                "high_ms": round(times[-1 - len(times) // 10], 5),
            }
        mine = timings["trl_turbo"]["median_ms"]
        row[phase] = {"tflops": round(work[phase] / mine / 1e9, 1), "timings": timings}
        others = "  ".join(f"{who} {t['median_ms']:.3f} ({t['median_ms'] / mine:.2f}x)" for who, t in timings.items())
        print(f"    {phase:<9} ms: {others}; {row[phase]['tflops']} TFLOP/s")
    row["extra_mib"] = {who: round(measure.peak_mib(phase_run("both", *parts)), 1) for who, parts in runs.items()}
    return row


def below(results: list[dict[str, Any]]) -> list[str]:
    """Which bars `both` misses."""
    missed = []
    for row in results:
        timings = {who: timing["median_ms"] for who, timing in row["both"]["timings"].items()}
        for who, time in timings.items():
            bar = BARS.get("padded" if row["case"] == "ragged" else who)
            if who != "trl_turbo" and bar is not None and time < bar * timings["trl_turbo"]:
                found = f"{time / timings['trl_turbo']:.2f}x of {bar}x"
                missed.append(f"{row['case']} {row['tokens']:,} ({row['heads']} heads) against {who}: {found}")
    return missed


def picture(results: list[dict[str, Any]], card: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{row['case']}\n{row['tokens']:,} tokens\n{row['heads']}/{row['key_heads']} heads" for row in results]
    peers = list(dict.fromkeys(who for row in results for who in row["both"]["timings"] if who != "trl_turbo"))
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained", sharey=True)
    for axis, phase in zip(axes, PHASES, strict=True):
        timings = [row[phase]["timings"] for row in results]
        speed = {
            f"over {who}": [t[who]["median_ms"] / t["trl_turbo"]["median_ms"] if who in t else None for t in timings]
            for who in peers
        }
        measure.grouped_bars(axis, speed)
        axis.axhline(1, color="black", linestyle="dotted")
        axis.set_xticks(range(len(names)), names, fontsize=6)
        axis.set_title(phase)
    axes[0].set_ylabel("times as fast")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"Attention over packed sequences, bf16, {card}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    parser.add_argument("--rounds", type=int, default=9 if CUDA else 2)
    parser.add_argument("--tune", action="store_true", help="rank tiles instead, within --seconds")
    parser.add_argument("--columns", type=int, nargs="+", default=[128, 64, 256], help="head dims to tune")
    parser.add_argument("--seconds", type=float, default=90, help="what tuning may take")
    args = parser.parse_args()
    torch.manual_seed(0)
    about = measure.environment(("triton",))
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    if args.tune:
        from benchmarks.kernels import attention_tune

        attention_tune.tune(args.columns, args.seconds)
        return
    results = [bench(case, shape, args.rounds) for case in cases() for shape in SHAPES]
    missed = below(results)
    if CUDA:
        print(f"\nbelow their bars: {'; '.join(missed) or 'none'}")
    if args.out is not None:
        data = {"environment": about, "bars": BARS, "below": missed, "results": results}
        measure.write(args.out, data, lambda path: picture(results, about["card"], path))


if __name__ == "__main__":
    main()
