"""Contestants that train one after the other on one machine, each in processes of its own, on the same work and seed.

Hosts differ by a third in what their processors give vLLM: a time is worth something as a ratio within one call alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import measure, models

#: What is on for trl_turbo beside the log-prob.
FEATURES = (
    "rollout",
    "shared_pass",
    "lora",
    "norms",
    "rope",
    "mlp",
    "attention",
    "packing",
    "checkpointing",
    "mlp_tiling",
    "memory",
)
#: Mean difference of a sampled token's log-prob between vLLM and the trainer from which on the weights are not the
#: same, unless the run has measured that rounding explains more in its model (`trl_turbo.engine.parity.explained`).
LARGEST_GAP = 0.05
# The last line of a traceback, behind a rank's name where a launcher puts that
_ERROR = re.compile(r"(\[rank\d+\]: *)?[\w.]*(Error|Exception|Exit|Interrupt)\b")
#: Keys of results, and what they are called.
Shown = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Contestant:
    """Who trains.

    Attributes:
        arguments: Of the module that trains, beside those of all.
        path: Where to import TRL from, if not from the environment.
        launcher: What starts its processes, as Python's own arguments, where it is not this Python itself.
        same_weights: Whether it is wrong where its samples are not of the trainer's weights to rounding.
        one_gpu: Whether it sees one GPU alone; transformers would spread a lone process's batch over all it sees.
    """

    arguments: Sequence[str] = ()
    path: str | None = None
    launcher: Sequence[str] = ()
    same_weights: bool = True
    one_gpu: bool = False


def patch_line(features: Iterable[str], more: str = "") -> str:
    """What a script says for these features, and no others of `FEATURES`.

    Args:
        features: By name.
        more: Keywords beside them, as Python.
    """
    wanted = dict.fromkeys(FEATURES, False) | dict.fromkeys(features, True)
    keywords = [f"{name}={on}" for name, on in wanted.items()] + ([more] if more else [])
    return f"import trl_turbo; trl_turbo.patch({', '.join(keywords)})"


def parser(about: str) -> argparse.ArgumentParser:
    """With the options of every contest; what it does not know is the training's.

    Args:
        about: Docstring of the command.
    """
    found = argparse.ArgumentParser(description=about.splitlines()[0], allow_abbrev=False)
    found.add_argument("--shape", default="qwen2.5-1.5b", choices=models.SHAPES)
    found.add_argument("--folder", type=Path, help="where the model is or will be; by default under /tmp")
    found.add_argument("--out", type=Path)
    found.add_argument("--only", nargs="+", help="contestants, by name")
    found.add_argument("--features", nargs="*", default=FEATURES, help="of patch(), for trl_turbo")
    return found


def stock_elsewhere(paths: Iterable[str]) -> dict[str, Contestant]:
    """Stock TRL from other folders, each given as NAME=FOLDER."""
    return {name: Contestant(path=path) for name, path in (each.split("=", 1) for each in paths)}


def environment(packages: Sequence[str]) -> dict[str, str]:
    """The machine and these packages, said at the beginning."""
    about = measure.environment(("trl", *packages))
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    return about


def model(shape: str, folder: Path | None = None) -> Path:
    """Make the model unless it is there; in a process of its own too, so that no memory of this one is in any peak."""
    folder = folder or Path("/tmp") / f"trl_turbo-{shape}"
    subprocess.run([sys.executable, "-m", "benchmarks.models", shape, str(folder)], check=True)
    return folder


def run(module: str, contestant: Contestant, log: Path) -> dict[str, Any]:
    """Train once in a new process, or in those that a launcher starts.

    Args:
        module: What trains; prints one line of JSON after `RESULT`.
        contestant: Who does, with all arguments.
        log: What it prints goes here.

    Returns:
        What it measured, or `error` with the last error that it printed, or else its last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ)
    if contestant.path:
        env["PYTHONPATH"] = contestant.path + (os.pathsep + env["PYTHONPATH"] if env.get("PYTHONPATH") else "")
    if contestant.one_gpu:
        env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = [sys.executable, *contestant.launcher, "-m", module, *contestant.arguments]
    with log.open("w") as out:
        subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    lines = log.read_text(errors="replace").splitlines()
    for line in lines:
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            limit = max(LARGEST_GAP, found.get("logp_gap_explained") or 0)
            if contestant.same_weights and not (found.get("logp_gap_largest") or 0) <= limit:
                return {"error": f"its samples are of other weights: gap {found['logp_gap_largest']:.3g}"} | found
            return found
    last = [line for line in reversed(lines) if line.strip()]
    # What libraries say on their way out stands behind the error
    errors = [line for line in last if _ERROR.match(line)]
    return {"error": next(iter([*errors, *last]), "printed nothing")}


def hold(
    module: str,
    contestants: Mapping[str, Contestant],
    args: argparse.Namespace,
    given: Sequence[str],
    shown: Shown,
) -> dict[str, dict[str, Any]]:
    """Let each train, and print a line for each.

    Args:
        module: As for :func:`run`.
        contestants: By name.
        args: What a :func:`parser` found.
        given: Arguments of all.
        shown: What is printed.
    """
    folder = model(args.shape, args.folder)
    results = {}
    for name, who in contestants.items():
        # On so many GPUs, it is still who it is
        if args.only and {name, name.partition(" on ")[0]}.isdisjoint(args.only):
            continue
        log = Path(f"{args.out or '/tmp/trl_turbo_bench'}.{name.replace(' ', '_')}.log")
        arguments = ("--model", str(folder), *given, *who.arguments)
        found = results[name] = run(module, replace(who, arguments=arguments), log)
        print(f"{name:<{max(map(len, contestants))}} ", found.get("error", ""), end="")
        print("  ".join(f"{label} {found[key]:.4g}" for key, label in shown if found.get(key) is not None), flush=True)
    return results


def picture(results: Mapping[str, dict[str, Any]], title: str, path: Path, shown: Shown) -> None:
    """Bars of those that were not wrong, a panel for each that is shown."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {name: r for name, r in results.items() if "error" not in r}
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.6), layout="constrained")
    for axis, (key, label) in zip(axes, shown, strict=True):
        axis.bar_label(axis.bar(list(drawn), [r[key] for r in drawn.values()]), fmt="%.4g")
        axis.set_title(label)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
