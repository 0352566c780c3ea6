"""What is a whole checkpoint, and that no other one is resumed from.

transformers writes into `checkpoint-N` itself, one file after the other, and goes on from the highest N. A process that
dies while it writes leaves a folder by that name without `trainer_state.json`, which comes last, and every later start
ends there with a FileNotFoundError. On more than one rank each writes its own random numbers, and the first rank does
not wait for the others before it writes that last file; here it does, so that the file stands for all of them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from trl_turbo.compat.signatures import misfit
from trl_turbo.patching import Replacement, as_written
from trl_turbo.report import note

PREFIX = "checkpoint-"
#: What transformers writes last.
STATE = "trainer_state.json"
METHODS = {"_save_rng_state": ("self", "output_dir"), "_load_from_checkpoint": ("self", "resume_from_checkpoint")}


def whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError):
        return False
    return True


def whole_checkpoints(root: Path) -> dict[int, Path]:
    """The whole checkpoints in a folder by their step, the last one last."""
    numbers = ((path.name.removeprefix(PREFIX), path) for path in root.glob(f"{PREFIX}*"))
    return {step: path for step, path in sorted((int(n), path) for n, path in numbers if n.isdigit()) if whole(path)}


def probe(module: ModuleType) -> str | None:
    """Why the module does not fit, or `None`."""
    reason = misfit(module, {"get_last_checkpoint": ("folder",)}) or misfit(module.Trainer, METHODS)
    if reason is not None:
        return reason
    called = as_written(module.Trainer._save_checkpoint).__code__.co_names
    if "_save_rng_state" not in called or "save_to_json" not in called:
        return "Trainer._save_checkpoint no longer writes random numbers and then the trainer's state"
    if called.index("_save_rng_state") > called.index("save_to_json"):
        return "Trainer._save_checkpoint writes the trainer's state before random numbers"
    return None


def build(module: ModuleType) -> Iterator[Replacement]:
    """What finds the last checkpoint, what reads one, and the last that every rank writes."""
    yield Replacement(module, "get_last_checkpoint", _last)
    yield Replacement(module.Trainer, "_load_from_checkpoint", _load)
    yield Replacement(module.Trainer, "_save_rng_state", _save)


def _last(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_last_checkpoint(folder: Any) -> Any:
        found = original(folder)
        if found is None or whole(Path(found)):
            return found
        others = [str(path) for path in whole_checkpoints(Path(folder)).values()]
        where = f"the run goes on from {others[-1]}" if others else "there is no whole checkpoint to go on from"
        note("resume", f"{found} was not written to its end, and {where}")
        return others[-1] if others else None

    return get_last_checkpoint


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(self: Any, resume_from_checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        path = Path(resume_from_checkpoint)
        if path.name.startswith(PREFIX) and path.is_dir() and not whole(path):
            raise ValueError(
                f"{path} was not written to its end: it has no readable {STATE}, which comes last; pass an earlier "
                "checkpoint, or resume_from_checkpoint=True for the last whole one"
            )
        return original(self, resume_from_checkpoint, *args, **kwargs)

    return load


def _save(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(self: Any, output_dir: str) -> None:
        original(self, output_dir)
        # A checkpoint on SIGTERM is written by each rank when it sees the signal, and others may be in the next step
        if self.args.world_size > 1 and not getattr(self.args, "enable_jit_checkpoint", False):
            self.accelerator.wait_for_everyone()

    return save
