"""Measure one run of a script, stock or patched, in a process of its own.

`python -m trl_turbo.demo.measure RESULT.json {stock,patched} SCRIPT [ARGUMENT ...]`
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# TRL sets these for a colocated vLLM, and a process that inherits them takes itself for a rank beside this one
_OF_A_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Measurement:
    """What one run cost.

    Attributes:
        peak_bytes: Peak resident memory of the process, less what it held when torch and TRL were imported.
        step_s: Median seconds a step, without the first.
        grad_norms: Gradient norm of each step, by which two runs can be seen to compute the same thing.
    """

    peak_bytes: int
    step_s: float
    grad_norms: list[float]


def run_script(script: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script as `python SCRIPT ARGUMENT ...` would, in this process; returns its globals."""
    before = sys.argv
    sys.argv = [str(script), *arguments]
    try:
        return runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before


def read_history(output_dir: Path) -> list[dict[str, float]]:
    """What the trainer logged at each step, from the state that it saved."""
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "reward" in entry]


def measure(
    script: Path, arguments: Sequence[str], *, output_dir: Path, patched: bool, env: Mapping[str, str] | None = None
) -> Measurement:
    """Run the script in a new process, so that neither run finds memory that the other left.

    Raises:
        RuntimeError: The process failed.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    result = output_dir / "measurement.json"
    mode = "patched" if patched else "stock"
    command = [sys.executable, "-m", "trl_turbo.demo.measure", str(result), mode, str(script), *arguments]
    command += ["--output_dir", str(output_dir)]
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCH}
    done = subprocess.run(command, env={**inherited, **(env or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        log = output_dir / "measurement.log"
        log.write_text(done.stdout + done.stderr)
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"the {mode} measurement failed with {last!r}: see {log} for all of its output.")
    history = read_history(output_dir)
    return Measurement(
        peak_bytes=json.loads(result.read_text())["peak_bytes"],
        # The first step warms caches up.
        step_s=statistics.median(entry["step_time"] for entry in history[1:] or history),
        grad_norms=[entry["grad_norm"] for entry in history],
    )


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(arguments: Sequence[str]) -> None:
    """The child's side of `measure`."""
    result, mode, script, *rest = arguments
    if mode == "patched":
        import trl_turbo

        trl_turbo.patch()
    import psutil
    from trl import GRPOTrainer  # noqa: F401  (loaded now, so that what importing costs is not counted)

    held = psutil.Process().memory_info().rss
    with contextlib.redirect_stdout(sys.stderr):
        run_script(Path(script), rest)
    Path(result).write_text(json.dumps({"peak_bytes": max(0, peak_bytes() - held)}))


if __name__ == "__main__":
    main(sys.argv[1:])
