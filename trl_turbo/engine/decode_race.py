"""Which of two ways through all layers is the faster one on this GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

_REPLAYS = 7

Calls = Sequence[Callable[[], object]]


def replays(calls: Calls, count: int) -> list[float]:
    """Times of a call in us, sorted, inside a CUDA graph of all of them; each reads other memory than the others.

    Args:
        calls: What to capture; each runs once before.
        count: How often to replay.
    """
    for call in calls:
        call()  # compiles, and makes what it keeps
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)


def microseconds(calls: Calls) -> float:
    """Their median, of a few."""
    return statistics.median(replays(calls, _REPLAYS))
