"""A checkpoint of the last step that was completed, written after the next one ran out of memory."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trl_turbo.patches.resume.checkpoints import STATE, whole_checkpoints


class Point:
    """Where a trainer stood between two steps: its random numbers; weights and optimizer change in the next one alone.

    Taken before each optimizer step's first forward; the states are in the host's memory, and reading them waits for
    nothing.

    Args:
        trainer: The trainer.

    Attributes:
        step: How many steps were completed.
    """

    def __init__(self, trainer: Any) -> None:
        import numpy

        self.step: int = trainer.state.global_step
        self._cuda = trainer.accelerator.device.type == "cuda"
        self._python, self._numpy, self._cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        self._device = torch.cuda.get_rng_state(trainer.accelerator.device) if self._cuda else None

    @contextmanager
    def random_numbers(self) -> Iterator[None]:
        """While open, the random numbers of the process are those of this point."""
        import numpy

        now = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        now_device = torch.cuda.get_rng_state() if self._cuda else None
        try:
            random.setstate(self._python)
            numpy.random.set_state(self._numpy)
            torch.set_rng_state(self._cpu)
            if self._device is not None:
                torch.cuda.set_rng_state(self._device)
            yield
        finally:
            random.setstate(now[0])
            numpy.random.set_state(now[1])
            torch.set_rng_state(now[2])
            if now_device is not None:
                torch.cuda.set_rng_state(now_device)


def left_behind(trainer: Any, point: Point | None, since: float) -> str:
    """Make sure that a run can be resumed from its last completed step where it can; says from where, in a sentence.

    Args:
        trainer: The trainer, whose step failed.
        point: Where it stood before it; `None` where its weights may be half updated.
        since: When its run began.
    """
    root = Path(trainer.args.output_dir)
    there = _checkpoints(root, since)
    if point is not None and point.step in there:
        return _from(there[point.step])
    reason = _unsaved(trainer, point)
    if reason is None and point is not None:
        try:
            return _from(_save(trainer, point, root))
        except Exception as error:  # the disk, say; what went wrong first is what must be told
            reason = f"saving step {point.step} failed ({type(error).__name__}: {error})"
    last = _from(there[max(there)]) if there else f"there is no checkpoint of this run in {root}"
    return f"{reason}; {last}"


def _unsaved(trainer: Any, point: Point | None) -> str | None:
    """Why the last completed step cannot be saved now, or `None`."""
    if point is None:
        return "it was not in a step of the trainer's, so that its state cannot be saved as that of a completed one"
    if point.step == 0:
        return "no step was completed"
    if trainer.accelerator.num_processes > 1:
        return "with several processes the others may have gone on, and saving would wait for them"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "its state is sharded"
    return None


def _save(trainer: Any, point: Point, root: Path) -> Path:
    """Write a checkpoint beside the others, under its name once it is whole."""
    root.mkdir(parents=True, exist_ok=True)
    args, state = trainer.args, trainer.state
    before = args.output_dir, args.push_to_hub, args.save_only_model, state.best_model_checkpoint
    folder = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=root))
    try:
        args.output_dir = str(folder / root.name)  # whose last part TRL names the model after
        args.push_to_hub = args.save_only_model = False
        with point.random_numbers():
            trainer._save_checkpoint(trainer.model, None)
        state.best_model_checkpoint = before[3]
        name = f"checkpoint-{point.step}"
        # Of another run, where one is there by that name
        target = root / name if not (root / name).exists() else Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
        return (folder / root.name / name).rename(target)
    finally:
        args.output_dir, args.push_to_hub, args.save_only_model, state.best_model_checkpoint = before
        shutil.rmtree(folder, ignore_errors=True)


def _from(checkpoint: Path) -> str:
    return f"resume with trainer.train(resume_from_checkpoint={str(checkpoint)!r})"


def _checkpoints(root: Path, since: float) -> dict[int, Path]:
    """Whole checkpoints of a run by their step."""
    return {n: path for n, path in whole_checkpoints(root).items() if (path / STATE).stat().st_mtime >= since}
