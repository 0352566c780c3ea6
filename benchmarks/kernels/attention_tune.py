"""Which tiles are fastest: `python -m benchmarks.kernels.attention --tune`.

Each pass has a short list of tiles. Processes that compile them beside each other also check each one, on a small
ragged batch with a shared prompt, against plain torch in float64; then each is timed, here, on a causal sequence. The
winners are for `trl_turbo/kernels/attention/plan.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from benchmarks.kernels.blocks import device_ms
from trl_turbo.kernels.attention import Segments, plan, reference
from trl_turbo.kernels.attention.plan import Tile
from trl_turbo.kernels.attention.spec import Spec
from trl_turbo.kernels.linear_logprob.reference import excess_error

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float16  # Triton's interpreter gets bfloat16 wrong
#: Products of each pass; the scores and the gradient of the weights are made in both passes of the backward.
PRODUCTS = {"forward": 2, "query": 3, "key": 4}
TOKENS, HEADS, KEY_HEADS = 8192, 16, 4
#: Compile one at a time takes two seconds each, and a process some seconds to start.
WORKERS = 12

CANDIDATES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        128: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(128, 128, 8, 3)),
        64: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 128, 4, 2), Tile(128, 64, 8, 3)),
        256: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(64, 32, 4, 3)),
    },
    "query": {
        128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 3)),
        64: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 128, 4, 2), Tile(128, 64, 8, 3)),
        256: (Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 4, 2)),
    },
    "key": {
        128: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 2)),
        64: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(128, 64, 8, 2)),
        256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 3)),
    },
}


def make(segments: Segments, width: int, heads: int, key_heads: int) -> tuple[torch.Tensor, ...]:
    """q, k, v and the gradient of the result, views of one projection."""
    g = torch.Generator(DEVICE).manual_seed(0)
    fused = torch.randn(segments.total, 2 * heads + 2 * key_heads, width, device=DEVICE, generator=g).to(DTYPE)
    return fused.split([heads, key_heads, key_heads, heads], 1)


def run_of(
    which: str, segments: Segments, tensors: tuple[torch.Tensor, ...], o: torch.Tensor, lse: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """What a pass alone runs."""
    from trl_turbo.kernels.attention import passes

    q, k, v, grad = tensors
    spec = Spec(q.shape[2] ** -0.5)
    if which == "forward":
        return lambda: passes.forward(q, k, v, segments, spec)
    if which == "query":
        return lambda: passes.queries(grad, q, k, v, o, lse, segments, spec)
    _, stats = passes.queries(grad, q, k, v, o, lse, segments, spec)
    return lambda: passes.keys(grad, q, k, v, stats, segments, spec)


def choose(which: str, columns: int, tile: Tile) -> None:
    plan.chosen[which, columns] = tile


def compile_and_check(which: str, columns: int, tile: Tile) -> str:
    """The excess error of a tile over plain torch's, in words; compiled for the shapes that are timed. In a process."""
    from trl_turbo.kernels.attention import passes

    lengths, prefix = ([176, 208, 0, 112, 1, 271], [-1, 0, 0, 0, 0, -1]) if CUDA else ([20, 9], [-1, 0])
    heads, key_heads = (HEADS, KEY_HEADS) if CUDA else (2, 1)
    found_worst = 0.0
    for segments in (Segments.build(lengths, prefix, DEVICE), Segments.build([sum(lengths)], device=DEVICE)):
        q, k, v, grad = tensors = make(segments, columns, heads, key_heads)
        spec = Spec(columns**-0.5)

        def by_torch(dtype: torch.dtype) -> list[torch.Tensor]:
            leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]  # noqa: B023
            o = reference.attention_reference(*leaves, segments, spec)  # noqa: B023
            return [o.detach(), *torch.autograd.grad(o, leaves, grad.to(dtype))]  # noqa: B023

        o, lse = passes.forward(q, k, v, segments, spec)
        choose(which, columns, tile)
        found = run_of(which, segments, tensors, o, lse)()
        picked = {"forward": (0,), "query": (1,), "key": (2, 3)}[which]
        plain, truth = by_torch(DTYPE), by_torch(torch.float64)
        for i, mine in zip(picked, found, strict=False):
            found_worst = max(found_worst, excess_error(mine, plain[i], truth[i]))
        plan.chosen.clear()
    return f"{found_worst:.2f}" if found_worst <= 1 else f"WRONG: {found_worst:.2f} of the allowed error"


def tune(widths: list[int], seconds: float) -> None:
    """Print a ranking for each head dim and pass; what does not fit into `seconds` is named and left out."""
    start = time.monotonic()
    jobs = [(which, width, tile) for width in widths for which in CANDIDATES for tile in CANDIDATES[which][width]]
    if not CUDA:
        jobs = [(which, 16, Tile(16, 16, 4, 1)) for which in CANDIDATES]
    checked: dict[tuple[str, int, Tile], str] = {}
    workers = max(1, min(WORKERS, (os.cpu_count() or 1) - 2)) if CUDA else 1
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(compile_and_check, *job): job for job in jobs}
        for future in as_completed(futures):
            try:
                checked[futures[future]] = future.result()
            except Exception as error:  # a tile that does not fit is a finding, not the end
                checked[futures[future]] = f"failed: {str(error).splitlines()[0][:110]}"
    print(f"compiled and checked {len(jobs)} in {time.monotonic() - start:.0f} s")
    for width in dict.fromkeys(width for _, width, _ in jobs):
        segments = Segments.build([TOKENS if CUDA else 40], device=DEVICE)
        tensors = make(segments, width, HEADS if CUDA else 2, KEY_HEADS if CUDA else 1)
        for which in CANDIDATES:
            ranking = []
            for job in jobs:
                if job[:2] != (which, width):
                    continue
                word = checked[job]
                if word[0].isdigit() and time.monotonic() - start < seconds:
                    ranking.append((timed(which, width, job[2], segments, tensors), job[2], word))
                else:
                    print(
                        f"D = {width:<4}{which:<8} {tuple(job[2])}: {word if not word[0].isdigit() else 'no time left'}"
                    )
            for ms, tile, word in sorted(ranking):
                work = PRODUCTS[which] * tensors[0].shape[1] * width * segments.total * (segments.total + 1)
                print(
                    f"D = {width:<4}{which:<8} {tuple(tile)!s:<20} {ms:8.3f} ms {work / ms / 1e9:7.1f} TFLOP/s  {word}"
                )


def timed(which: str, width: int, tile: Tile, segments: Segments, tensors: tuple[torch.Tensor, ...]) -> float:
    from trl_turbo.kernels.attention import passes

    q, k, v, _ = tensors
    plan.chosen.clear()
    o, lse = passes.forward(q, k, v, segments, Spec(width**-0.5))
    choose(which, width, tile)
    times = device_ms([run_of(which, segments, tensors, o, lse)] * 3, 5 if CUDA else 1)
    plan.chosen.clear()
    return statistics.median(times)
