"""`linear_logprob` against TRL's and Liger's fused heads and against the matrix products alone.

    python -m benchmarks.kernels.linear_logprob --out benchmarks/results/linear_logprob

Checks its own results first, by the rule of the tests: no further from float32 than plain torch in the same dtype.
Writes OUT.json and OUT.png. Without a CUDA device it runs tiny sizes in float32, to show that it runs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import measure
from trl_turbo.kernels.linear_logprob import linear_logprob
from trl_turbo.kernels.linear_logprob.reference import excess_error, linear_logprob_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
TEMPERATURE = 0.9
CASES = ("frozen", "no_grad", "trained")
# Products of [N, H] x [H, V] that the case cannot do without
PRODUCTS = {"frozen": 2, "no_grad": 1, "trained": 4}
# What a ratio is judged by: TRL's head, and the two of Liger's that give a gradient for each token's log-prob.
# Liger's mean loss is shown beside them: it returns one number, takes no weight by token, and gives neither log-probs
# nor entropies.
JUDGED = ("trl", "liger_none", "liger_grpo")
BARS = {"frozen": 1.25, "no_grad": 1.0, "trained": 1.0}

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(n: int, h: int, v: int) -> Inputs:
    """Hidden states [N, H] and a head [V, H] whose logits spread as a language model's do, targets [N], factors [N]."""
    g = torch.Generator(DEVICE).manual_seed(n + h)
    hidden = torch.randn(n, h, device=DEVICE, generator=g).to(DTYPE)
    weight = (torch.randn(v, h, device=DEVICE, generator=g) * (2.5 / h**0.5)).to(DTYPE)
    targets = torch.randint(0, v, (n,), device=DEVICE, generator=g)
    factors = torch.randn(n, device=DEVICE, generator=g) / n
    return hidden, weight, targets, factors


def ours(hidden, weight, targets):
    out = linear_logprob(hidden, weight, targets, temperature=TEMPERATURE, outputs=("logps", "entropy"))
    return out.logps


def contestants() -> dict[str, Callable]:
    """Each as (hidden, weight, targets) -> log-probs [N], or a scalar mean; those that are installed."""
    found: dict[str, Callable] = {"trl_turbo": ours}
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def trl(hidden, weight, targets):
            return ChunkedLogProbFunction.apply(
                hidden, weight, None, targets, TEMPERATURE, 32768, None, 1.0, ("log_probs", "entropy")
            )[0]

        found["trl"] = trl
    except ImportError:
        print("TRL's fused head is not installed (TRL >= 1.15 has it): left out")
    if not CUDA:
        return found
    try:
        from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as flce

        # No temperature there: dividing the hidden states beforehand would be extra work, so it runs at 1
        found["liger_none"] = lambda hidden, weight, targets: -flce(hidden, weight, targets, reduction="none")
        found["liger_grpo"] = lambda hidden, weight, targets: _ChunkedSelectiveLogProbFunction.apply(
            hidden, weight, targets, None, TEMPERATURE, 4096
        )
        found["liger_mean"] = lambda hidden, weight, targets: -flce(hidden, weight, targets)
    except ImportError:
        print("Liger is not installed: left out")
    return found


def run_of(case: str, fn: Callable, inputs: Inputs) -> Callable[[], object]:
    """One step of `case`: forward, and for all but `no_grad` the backward with a factor for each token."""
    hidden, weight, targets, factors = inputs
    if case == "no_grad":

        def forward():
            with torch.no_grad():
                return fn(hidden, weight, targets)

        return forward
    wanted = (hidden, weight) if case == "trained" else (hidden,)

    def step():
        leaves = [x.detach().requires_grad_() for x in wanted]
        out = fn(leaves[0], leaves[1] if len(leaves) > 1 else weight, targets)
        return torch.autograd.grad(out, leaves, factors if out.ndim else None)

    return step


def check(inputs: Inputs, rows: int) -> dict[str, float]:
    """Excess error of each result over plain torch's; above 1 is wrong, and nothing is timed then."""
    hidden, weight, targets, factors = inputs
    some = torch.randperm(hidden.shape[0], device=DEVICE)[:rows]
    leaf = hidden.detach().requires_grad_()
    out = linear_logprob(leaf, weight, targets, temperature=TEMPERATURE, outputs=("logps", "entropy"))
    grad = torch.autograd.grad(out.logps, leaf, factors)[0]
    found = {"logps": out.logps[some], "entropy": out.entropy[some], "grad_hidden": grad[some]}
    small = hidden[some].detach().requires_grad_(), weight.detach().requires_grad_()
    out = linear_logprob(*small, targets[some], temperature=TEMPERATURE, outputs=("logps", "entropy"))
    grads = torch.autograd.grad(out.logps, small, factors[some])
    found |= {"trained_grad_hidden": grads[0], "trained_grad_weight": grads[1]}

    def reference(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden[some], weight)]
        out = linear_logprob_reference(*leaves, targets[some], temperature=TEMPERATURE)
        grads = torch.autograd.grad(out.logps, leaves, factors[some])
        result = {"logps": out.logps.detach(), "entropy": out.entropy.detach(), "grad_hidden": grads[0]}
        return result | {"trained_grad_hidden": grads[0], "trained_grad_weight": grads[1]}

    plain, truth = reference(DTYPE), reference(torch.float32 if CUDA else torch.float64)
    excess = {name: excess_error(found[name], plain[name], truth[name]) for name in found}
    print("  error over the allowed:", "  ".join(f"{name} {value:.3f}" for name, value in excess.items()))
    wrong = [name for name, value in excess.items() if not value <= 1]
    if wrong:
        raise SystemExit(
            f"Wrong results are not timed: {', '.join(wrong)} further from float32 than plain torch allows."
        )
    return excess


def products(case: str, inputs: Inputs) -> Callable[[], object]:
    """The matrix products of `case` alone, an eighth of the vocabulary at a time, each result overwriting the last."""
    hidden, weight, _, _ = inputs
    pieces = weight.chunk(8)
    tile = torch.randn(hidden.shape[0], pieces[0].shape[0], device=DEVICE).to(DTYPE)
    scratch, grad = torch.empty_like(tile), torch.empty_like(hidden)
    grad_piece = torch.empty_like(pieces[0])

    def run():
        for piece in pieces:
            w = piece.shape[0]
            torch.mm(hidden, piece.t(), out=scratch[:, :w])
            if case == "trained":
                torch.mm(hidden, piece.t(), out=scratch[:, :w])
                torch.mm(tile[:, :w].t(), hidden, out=grad_piece[:w])
            if case != "no_grad":
                torch.mm(tile[:, :w], piece, out=grad)

    return run


def shown(name: str, case: str, n: int) -> bool:
    """Liger's mean loss has no like in the other cases; its GRPO head, 4 to 10 times slower, is timed on the small
    batch.
    """
    return (name != "liger_mean" or case == "frozen") and (name != "liger_grpo" or n <= 8192)


def bench(n: int, h: int, v: int, rounds: int, found: dict[str, Callable]) -> list[dict]:
    print(f"\nN = {n:,}  H = {h:,}  V = {v:,}  {str(DTYPE).removeprefix('torch.')}")
    inputs = make_inputs(n, h, v)
    excess = check(inputs, min(n, 512))
    results = []
    for case in CASES:
        runs = {name: run_of(case, fn, inputs) for name, fn in found.items() if shown(name, case, n)}
        timings = measure.interleaved(runs, rounds)
        if CUDA:
            run = products(case, inputs)
            timings |= measure.interleaved({"products": run}, rounds)
            del run
        mine = timings["trl_turbo"]
        print(f"  {case:<10}{'median ms':>11}{'p10':>9}{'p90':>9}{'ours is':>9}{'extra MiB':>11}")
        for name, t in timings.items():
            ratio = f"{t.median_ms / mine.median_ms:.2f}x"
            extra = "" if name == "products" else f"{t.extra_mib:.0f}"
            print(f"    {name:<10}{t.median_ms:>9.2f}{t.low_ms:>9.2f}{t.high_ms:>9.2f}{ratio:>9}{extra:>11}")
        peers = [timings[name] for name in JUDGED if name in timings]
        verdict = {
            "faster": all(p.median_ms / mine.median_ms >= BARS[case] for p in peers),
            "no_more_memory": all(p.extra_mib >= mine.extra_mib for p in peers),
        }
        if CUDA:
            print(f"    at least {BARS[case]}x: {verdict['faster']}; no more memory: {verdict['no_more_memory']}")
        results.append(
            {"case": case, "n": n, "h": h, "v": v, "excess_error": excess, "bar": BARS[case], **verdict}
            | {"timings": measure.as_rows(timings), "products": PRODUCTS[case]}
        )
    return results


def picture(results: list[dict], card: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys((r["n"], r["h"]) for r in results))
    figure, axes = plt.subplots(1, len(CASES), figsize=(5 * len(CASES), 4.2), layout="constrained")
    for axis, case in zip(axes, CASES, strict=True):
        rows = {(r["n"], r["h"]): r["timings"] for r in results if r["case"] == case}
        names = [name for name in ("trl_turbo", "trl", "liger_none", "liger_mean") if name in rows[sizes[0]]]
        over = {
            name: [rows[size][name]["median_ms"] / rows[size]["trl_turbo"]["median_ms"] for size in sizes]
            for name in names
        }
        for bars in measure.grouped_bars(axis, over).values():
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        if "products" in rows[sizes[0]]:
            floor = [rows[size]["products"]["median_ms"] / rows[size]["trl_turbo"]["median_ms"] for size in sizes]
            axis.hlines(
                floor, [k - 0.4 for k in range(len(sizes))], [k + 0.4 for k in range(len(sizes))], "black", "dotted"
            )
        axis.set_title(
            {"frozen": "forward + backward, frozen head", "no_grad": "forward, no gradient"}.get(case, "trained head")
        )
        axis.set_xticks(range(len(sizes)), [f"N {n:,}\nH {h:,}" for n, h in sizes])
        axis.set_ylabel("time, trl_turbo = 1")
        axis.legend(fontsize=7)
    figure.suptitle(f"Log-probs and entropies from hidden states, {card}; dotted: the matrix products alone")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    parser.add_argument("--rounds", type=int, default=7 if CUDA else 3)
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 33792] if CUDA else [64])
    parser.add_argument("--hidden", type=int, nargs="+", default=[1536, 4096] if CUDA else [32])
    parser.add_argument("--vocab", type=int, default=151_936 if CUDA else 1_000)
    args = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_float32_matmul_precision("highest")  # the truth is float32, not tf32
    torch.manual_seed(0)
    about = measure.environment(("triton", "trl", "liger-kernel", "transformers"))
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    found = contestants()
    results = []
    for h in args.hidden:
        for n in args.rows:
            results += bench(n, h, args.vocab, args.rounds, found)
            if CUDA:
                torch.cuda.empty_cache()
    if args.out is not None:
        data = {"environment": about, "results": results}
        measure.write(args.out, data, lambda path: picture(results, about["card"], path))


if __name__ == "__main__":
    main()
