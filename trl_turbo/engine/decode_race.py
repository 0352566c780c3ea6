"""Which of two ways through all layers is the faster one on this GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

_REPLAYS = 7

Calls = Sequence[Callable[[], object]]


def microseconds(calls: Calls) -> float:
    """The time of a call inside a CUDA graph of all of them; each reads other memory, so that no cache serves it."""
    for call in calls:
        call()  # compiles, and makes what it keeps
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) * 1e3 / len(calls)
