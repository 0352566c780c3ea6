"""Timing and memory on one device, for every benchmark: interleaved rounds, medians, and what is needed to repeat
them.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Timing:
    """Of one contestant in one setting."""

    median_ms: float
    low_ms: float  # 10th percentile
    high_ms: float  # 90th percentile
    extra_mib: float  # peak torch memory above what lay there before


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time each run once a round, in turn, so that a clock that drifts drifts for all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    memory = {}
    for name, run in runs.items():
        run()
        memory[name] = peak_mib(run)
    once = {name: one_ms(run) for name, run in runs.items()}
    for k in range(rounds):
        for name, run in runs.items():
            if k < 3 or once[name] < 6 * min(once.values()):  # three show well enough that one is far behind
                times[name].append(one_ms(run))
    return {name: _timing(sorted(values), memory[name]) for name, values in times.items()}


def one_ms(run: Callable[[], object]) -> float:
    """One run, by device events on CUDA (its launches included), by the clock elsewhere."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_mib(run: Callable[[], object]) -> float:
    """Peak torch memory during a run, above what was there before it; 0 without CUDA."""
    if not torch.cuda.is_available():
        run()
        return 0.0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def environment(packages: tuple[str, ...]) -> dict[str, str]:
    """The machine, the versions and the command behind a result."""
    found = {
        "python": platform.python_version(),
        "command": "python -m " + _module() + "".join(f" {x}" for x in sys.argv[1:]),
    }
    for package in ("torch", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["torch"] = torch.__version__
    if torch.cuda.is_available():
        found["card"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = _driver()
    else:
        found["card"] = "CPU"
    return found


def as_rows(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    """For JSON, rounded to what was measured."""
    return {name: {key: round(value, 4) for key, value in asdict(t).items()} for name, t in timings.items()}


def write(out: Path, data: Mapping[str, Any], picture: Callable[[Path], None]) -> None:
    """Write OUT.json and, by `picture`, OUT.png; OUT may have dots in it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(f"{out.name}.json").write_text(json.dumps(data, indent=1) + "\n")
    picture(out.with_name(f"{out.name}.png"))
    print(f"\nwrote {out}.json and .png")


def grouped_bars(axis: Any, series: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Draw bars side by side, a group for each place in the series; returns what `axis.bar` gave, by name.

    Args:
        axis: matplotlib's.
        series: Heights by the name in the legend; `None` leaves a place free.
    """
    drawn = {}
    for i, (name, heights) in enumerate(series.items()):
        shift = (i - (len(series) - 1) / 2) * 0.8 / len(series)
        found = [(k + shift, height) for k, height in enumerate(heights) if height is not None]
        drawn[name] = axis.bar([at for at, _ in found], [height for _, height in found], 0.8 / len(series), label=name)
    return drawn


def _timing(values: list[float], extra_mib: float) -> Timing:
    last = len(values) - 1
    return Timing(statistics.median(values), values[round(0.1 * last)], values[round(0.9 * last)], extra_mib)


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else sys.argv[0]


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
