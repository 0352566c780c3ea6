"""Norms, rotary embedding and gated product against transformers' eager modules and Liger's functions.

    python -m benchmarks.kernels.blocks --out benchmarks/results/blocks

Checks first that nothing is further from float64 than plain torch in the same dtype; a wrong kernel is not timed. Then
the device's time of the forward, the backward and both, and the bytes that each must read and write over that time, as
a share of what a copy reaches. Writes OUT.json and OUT.png. Without a CUDA device it runs tiny sizes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import measure
from trl_turbo.kernels.gated import gated
from trl_turbo.kernels.gated import reference as gated_reference
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.kernels.rms_norm import add_rms_norm, rms_norm
from trl_turbo.kernels.rms_norm import reference as norm_reference
from trl_turbo.kernels.rms_norm.spec import Norm
from trl_turbo.kernels.rope import reference as rope_reference
from trl_turbo.kernels.rope import rope

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16
EPS = 1e-6
PHASES = ("forward", "backward", "both")
#: The share of a copy's bytes a second that RMSNorm, RoPE and SwiGLU are to reach, forward and backward.
BAR = 0.85
BARRED = ("rms_norm", "rope", "swiglu")
#: Inputs and outputs rotate through more than an H200's 50 MB of L2.
ROTATE_BYTES = (512 << 20) if CUDA else 0
#: hidden: heads, heads of keys, head dim, columns of the MLP. Qwen2.5-1.5B's and Llama-3.1-8B's.
MODELS = {1536: (12, 2, 128, 8960), 4096: (32, 8, 128, 14336), 64: (4, 2, 16, 160)}

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Op:
    """One operation at one size."""

    inputs: Tensors
    train: tuple[int, ...]  # which of them get a gradient
    ours: Callable[..., Any]
    plain: Callable[..., Any]  # what transformers does, in any dtype
    moved: dict[str, int]  # bytes that each phase must read and write
    liger: str = ""  # its function, of liger_kernel.transformers.functional
    liger_kwargs: dict[str, Any] | None = None
    stock: Callable[..., Any] | None = None  # transformers' own, where `plain` is not it


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


def llama_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm.forward(SimpleNamespace(weight=weight, variance_epsilon=EPS), x)


def add_llama_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Tensors:
    total = x + residual
    return llama_norm(total, weight), total


def add_plain_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Tensors:
    total = x + residual
    return norm_reference.rms_norm_reference(total, weight, Norm(EPS)), total


def gemma_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    module = SimpleNamespace(weight=weight, eps=EPS)
    module._norm = partial(Gemma2RMSNorm._norm, module)
    return Gemma2RMSNorm.forward(module, x)


def llama_rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Tensors:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb(q, k, cos, sin)


def mlp_product(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from transformers.activations import ACT2FN

    return ACT2FN[activation](gate) * up


def norm_ops(n: int, hidden: int, heads: int, width: int) -> dict[str, Op]:
    """Norms of hidden states [N, H] and of heads [N * heads, D], the weight frozen (as under LoRA) and trained."""

    def moved(x: torch.Tensor, forward: int, backward: int) -> dict[str, int]:
        return phases(x.nbytes * forward, x.nbytes * backward)

    x, residual, weight = randn(1, n, hidden), randn(1, n, hidden), 1 + 0.1 * randn(hidden)
    rows, head_weight = randn(1, n, heads, width), 1 + 0.1 * randn(width)
    kwargs = {"ours": lambda x, w: rms_norm(x, w, EPS), "liger": "liger_rms_norm", "liger_kwargs": {"eps": EPS}}
    kwargs["stock"] = llama_norm
    kwargs["plain"] = lambda x, w: norm_reference.rms_norm_reference(x, w, Norm(EPS))
    gemma = Norm(EPS, 1.0, True)
    return {
        "rms_norm": Op((x, weight), (0,), moved=moved(x, 2, 3), **kwargs),
        "rms_norm, trained": Op((x, weight), (0, 1), moved=moved(x, 2, 3), **kwargs),
        "rms_norm, Gemma": Op(
            (x, weight),
            (0,),
            lambda x, w: rms_norm(x, w, EPS, offset=1.0, scale_in_float32=True),
            lambda x, w: norm_reference.rms_norm_reference(x, w, gemma),
            moved(x, 2, 3),
            "liger_rms_norm",
            {"eps": EPS, "offset": 1.0, "casting_mode": "gemma"},
            gemma_norm,
        ),
        "add_rms_norm": Op(
            (x, residual, weight),
            (0, 1),
            lambda x, r, w: add_rms_norm(x, r, w, EPS),
            add_plain_norm,
            moved(x, 4, 4),
            "liger_fused_add_rms_norm",
            {"eps": EPS},
            add_llama_norm,
        ),
        "qk_norm": Op((rows, head_weight), (0,), moved=moved(rows, 2, 3), **kwargs),
    }


def rope_op(n: int, heads: int, k_heads: int, width: int) -> Op:
    """q and k [1, H, N, D] as projections give them, transposed."""
    q, k = (randn(1, n, count, width).transpose(1, 2) for count in (heads, k_heads))
    angles = (torch.rand(1, n, width // 2, device=DEVICE) * 6).repeat(1, 1, 2)
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)

    def plain(q, k, cos, sin):
        return tuple(rope_reference.rope_reference(x, cos, sin, False) for x in (q, k))

    nbytes = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
    return Op((q, k, cos, sin), (0, 1), rope, plain, phases(nbytes, nbytes), "liger_rope", stock=llama_rope)


def gated_op(n: int, inner: int, activation: str, liger: str) -> Op:
    gate, up = randn(1, n, inner), randn(1, n, inner)
    return Op(
        (gate, up),
        (0, 1),
        lambda gate, up: gated(gate, up, activation),
        lambda gate, up: gated_reference.gated_reference(gate, up, activation),
        phases(3 * gate.nbytes, 5 * gate.nbytes),
        liger,
        stock=partial(mlp_product, {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)),
    )


def phases(forward: int, backward: int) -> dict[str, int]:
    return {"forward": forward, "backward": backward, "both": forward + backward}


def ops(n: int, hidden: int) -> dict[str, Callable[[], dict[str, Op]]]:
    """By family, made when their turn comes, as all inputs at once would take much memory."""
    heads, k_heads, width, inner = MODELS[hidden]
    return {
        "norms": lambda: norm_ops(n, hidden, heads, width),
        "rope": lambda: {"rope": rope_op(n, heads, k_heads, width)},
        "swiglu": lambda: {"swiglu": gated_op(n, inner, "silu", "liger_swiglu")},
        "geglu": lambda: {"geglu": gated_op(n, inner, "gelu_tanh", "liger_geglu")},
    }


def contestants(op: Op) -> dict[str, Callable[..., Any]]:
    found = {"trl_turbo": op.ours, "transformers": op.stock or op.plain}
    if CUDA and op.liger:
        try:
            from liger_kernel.transformers import functional
        except ImportError:
            return found
        liger, kwargs = getattr(functional, op.liger), op.liger_kwargs or {}
        found["liger"] = lambda *inputs: liger(*inputs, **kwargs)
    return found


def outputs_of(fn: Callable[..., Any], inputs: Tensors) -> Tensors:
    out = fn(*inputs)
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def with_leaves(op: Op, inputs: Tensors) -> tuple[Tensors, Tensors]:
    leaves = [x.detach().requires_grad_(i in op.train) for i, x in enumerate(inputs)]
    return tuple(leaves), tuple(leaves[i] for i in op.train)


def check(name: str, op: Op) -> dict[str, float]:
    """Excess error of outputs and gradients over plain torch's; above 1 is wrong, and nothing is timed then."""
    torch.manual_seed(1)
    grads: list[torch.Tensor] = []

    def results(fn: Callable[..., Any], dtype: torch.dtype) -> list[torch.Tensor]:
        inputs, leaves = with_leaves(op, tuple(x.to(dtype) for x in op.inputs))
        outputs = outputs_of(fn, inputs)
        grads.extend(torch.randn_like(x) for x in outputs[len(grads) :])
        pulled = torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in grads])
        return [*(x.detach() for x in outputs), *pulled]

    before = [x.clone() for x in op.inputs]
    found, plain, truth = results(op.ours, DTYPE), results(op.plain, DTYPE), results(op.plain, torch.float64)
    excess = max(excess_error(*three) for three in zip(found, plain, truth, strict=True))
    print(f"    error over the allowed: {excess:.3f}")
    changed = any(not torch.equal(*pair) for pair in zip(before, op.inputs, strict=True))
    if changed or not excess <= 1:
        raise SystemExit(f"Wrong results are not timed: {name}'s error is {excess:.2f} of the allowed; {changed=}.")
    return {"excess_error": excess}


def runs_of(phase: str, fn: Callable[..., Any], op: Op, copies: list[Tensors]) -> list[Callable[[], object]]:
    """One run for each copy of the inputs. Backward alone goes over a kept graph, so that Liger, whose backward writes
    over its inputs, computes garbage then, in the same time.
    """
    made = []
    for copy in copies:
        inputs, leaves = with_leaves(op, copy)
        if phase == "forward":
            made.append(lambda inputs=inputs: outputs_of(fn, inputs))
            continue
        with torch.no_grad():
            grads = [torch.randn_like(x) for x in outputs_of(fn, tuple(x.clone() for x in copy))]

        def both(inputs=inputs, leaves=leaves, grads=grads):
            # Liger writes over what it is given: clones' values do not matter to the time, the rotation does
            return torch.autograd.grad(outputs_of(fn, inputs), leaves, grads)

        if phase == "both":
            made.append(both)
        else:
            outputs = outputs_of(fn, inputs)
            made.append(
                lambda outputs=outputs, leaves=leaves, grads=grads: torch.autograd.grad(
                    outputs, leaves, grads, retain_graph=True
                )
            )
    return made


def device_ms(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Time of a run on the device, its launches hidden behind a sleeping kernel; results are kept for one rotation."""
    kept: list[object] = [None] * len(runs)
    for i, run in enumerate(runs):
        kept[i] = run()
    times = []
    for _ in range(rounds):
        if not CUDA:
            times.append(min(measure.one_ms(run) for run in runs))
            continue
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000 + 600_000 * len(runs))  # a third of a millisecond a run, at 1.7 GHz
        begin.record()
        for i, run in enumerate(runs):
            kept[i] = run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(runs))
    return sorted(times)


def copy_gbps(nbytes: int, rounds: int) -> float:
    """Bytes read and written a second by copies that together move as many bytes as the operation does."""
    size = max(nbytes // 2, 1)
    pairs = [
        (torch.ones(size, dtype=torch.uint8, device=DEVICE), torch.empty(size, dtype=torch.uint8, device=DEVICE))
        for _ in range(copies_for(nbytes))
    ]
    times = device_ms([lambda x=x, y=y: y.copy_(x) for x, y in pairs], rounds)
    return 2 * size / statistics.median(times) / 1e6


def copies_for(nbytes: int) -> int:
    return max(1, min(32, -(-ROTATE_BYTES // nbytes)))


def bench(n: int, hidden: int, rounds: int) -> list[dict[str, Any]]:
    results = []
    for family in ops(n, hidden).values():
        for name, op in family().items():
            print(f"\n  {name}  N = {n:,}  H = {hidden:,}")
            row = {"op": name, "n": n, "hidden": hidden, **check(name, op)}
            for phase in PHASES:
                nbytes = op.moved[phase]
                copy = copy_gbps(nbytes, rounds)
                timings = {}
                for who, fn in contestants(op).items():
                    copies = [tuple(x.clone() for x in op.inputs) for _ in range(copies_for(nbytes))]
                    times = device_ms(runs_of(phase, fn, op, copies), rounds)
                    timings[who] = {
                        "median_ms": round(statistics.median(times), 5),
                        "low_ms": round(times[len(times) // 10], 5),
                        "high_ms": round(times[-1 - len(times) // 10], 5),
                    }
                    del copies
                    if CUDA:
                        torch.cuda.empty_cache()
                gbps = nbytes / timings["trl_turbo"]["median_ms"] / 1e6
                others = "  ".join(f"{who} {t['median_ms'] * 1e3:.1f}" for who, t in timings.items())
                print(f"    {phase:<9} us: {others}; {gbps:,.0f} GB/s, {gbps / copy:.0%} of a copy's {copy:,.0f}")
                row[phase] = {"bytes": nbytes, "gbps": round(gbps, 1), "copy_gbps": round(copy, 1), "timings": timings}
            results.append(row)
    return results


def picture(results: list[dict[str, Any]], card: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys((row["n"], row["hidden"]) for row in results))
    names = list(dict.fromkeys(row["op"] for row in results))
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained", sharey=True)
    for axis, phase in zip(axes, PHASES[:2], strict=True):
        shares = {}
        for n, hidden in sizes:
            rows = {row["op"]: row[phase] for row in results if (row["n"], row["hidden"]) == (n, hidden)}
            shares[f"N {n:,}, hidden {hidden:,}"] = [rows[name]["gbps"] / rows[name]["copy_gbps"] for name in names]
        measure.grouped_bars(axis, shares)
        axis.axhline(BAR, color="black", linestyle="dotted")
        axis.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8)
        axis.set_title(phase)
    axes[0].set_ylabel("share of a copy's bytes a second")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"Norms, rotary embedding and gated product, bf16, {card}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    parser.add_argument("--rounds", type=int, default=11 if CUDA else 2)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 32768] if CUDA else [48])
    parser.add_argument("--hidden", type=int, nargs="+", choices=list(MODELS), default=[1536, 4096] if CUDA else [64])
    args = parser.parse_args()
    torch.manual_seed(0)
    about = measure.environment(("triton", "liger-kernel", "transformers"))
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    for hidden in args.hidden:
        for n in args.rows:
            results += bench(n, hidden, args.rounds)
    below = [
        f"{row['op']} {phase} (N {row['n']:,}, hidden {row['hidden']:,})"
        for row in results
        for phase in PHASES[:2]
        if row["op"] in BARRED and row[phase]["gbps"] < BAR * row[phase]["copy_gbps"]
    ]
    if CUDA:
        print(f"\nbelow {BAR:.0%} of a copy: {', '.join(below) or 'none'}")
    if args.out is not None:
        data = {"environment": about, "bar": BAR, "below": below, "results": results}
        measure.write(args.out, data, lambda path: picture(results, about["card"], path))


if __name__ == "__main__":
    main()
