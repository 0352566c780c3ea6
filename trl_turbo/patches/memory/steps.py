"""The borders of phases: what the driver has in use there, and what becomes of a lack of memory in between.

torch's allocator keeps what it took, so that what is in use at the end of a phase is the most that the phase had; that
is one question to the driver at each border, and resets no counter of the script's own.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

from trl_turbo.compat.signatures import misfit
from trl_turbo.memory_plan.trainer import phases_of, planned
from trl_turbo.patches.memory import shortage
from trl_turbo.patches.memory.resumable import Point
from trl_turbo.patching import Replacement
from trl_turbo.report import current_peaks, note

#: Where a trainer keeps the point to which it can be taken back, the phase that it is in, when its run began, and
#: whether torch's cache may still hold what a rollout took.
POINT, PHASE, SINCE, SAMPLED = KEPT = tuple(f"_trl_turbo_{name}" for name in ("point", "phase", "since", "sampled"))
#: By which a file's time may be behind the clock.
FILE_TIME_S = 2

_TRAINS: ContextVar[Any] = ContextVar("trl_turbo_memory_trains", default=None)


def training() -> Any:
    """The trainer that trains now, or `None`."""
    return _TRAINS.get()


@contextmanager
def rollout(trainer: Any) -> Iterator[None]:
    """While open, a trainer samples; measured where it ends, so close it before a cache is given up.

    Args:
        trainer: The trainer; nothing happens for `None`.
    """
    if trainer is None:
        yield
        return
    vars(trainer)[PHASE] = "rollout"
    yield
    # Where it raised, it is the phase that it raised in
    vars(trainer)[PHASE] = "training"
    vars(trainer)[SAMPLED] = True
    measure(trainer, "rollout")


def probe(module: ModuleType, trainer_name: str, sampling: tuple[str, ...]) -> str | None:
    """Why the module does not fit, or `None`."""
    trainer = getattr(module, trainer_name, None)
    if trainer is None:
        return f"{module.__name__} has no {trainer_name}"
    missing = [name for name in ("train", "training_step", *sampling) if not hasattr(trainer, name)]
    if missing:
        return f"{trainer_name} has no {missing[0]}"
    if "_save_checkpoint" not in dir(trainer):
        return f"{trainer_name} has no _save_checkpoint"
    return misfit(trainer, dict.fromkeys(sampling, ("self",)))


def build(module: ModuleType, trainer_name: str, sampling: tuple[str, ...]) -> Iterator[Replacement]:
    """The training loop, its step, and what samples within it."""
    trainer = getattr(module, trainer_name)
    yield Replacement(trainer, "train", make_train)
    yield Replacement(trainer, "training_step", _training_step)
    for name in sampling:
        if inspect.isfunction(inspect.getattr_static(trainer, name)):
            yield Replacement(trainer, name, _sampled)


def make_train(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a training: it is planned first, and running out of memory says why."""

    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        found, reason = planned(self)
        peaks = current_peaks()
        if found is None:
            note("memory", reason)
        elif peaks is not None:
            peaks.predict(phases_of(found))
        for name in KEPT:
            vars(self).pop(name, None)
        if not (args or kwargs.get("resume_from_checkpoint")):  # else what is there is this run's
            vars(self)[SINCE] = time.time() - FILE_TIME_S
        token = _TRAINS.set(self)
        try:
            return original(self, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            if shortage.is_told(error) or getattr(self.args, "auto_find_batch_size", False):
                raise
            # Outside of a step, the optimizer's included: what is in memory may be half of an update
            raise shortage.told(self, error, _phase(self), None, _since(self)) from error
        finally:
            _TRAINS.reset(token)
            for name in KEPT:
                vars(self).pop(name, None)

    return train


def _training_step(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        point = vars(self).get(POINT)
        if point is None or point.step != self.state.global_step:
            point = Point(self)
            vars(self)[POINT] = point
        try:
            result = original(self, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            if shortage.is_told(error) or getattr(self.args, "auto_find_batch_size", False):
                raise
            raise shortage.told(self, error, _phase(self), point, _since(self)) from error
        measure(self, "training")
        return result

    return training_step


def _sampled(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sampled(self: Any, *args: Any, **kwargs: Any) -> Any:
        with rollout(self):
            return original(self, *args, **kwargs)

    return sampled


def _phase(trainer: Any) -> str:
    return vars(trainer).get(PHASE, "training")


def _since(trainer: Any) -> float:
    return vars(trainer).get(SINCE, 0.0)


def measure(trainer: Any, phase: str) -> None:
    """Keep what the driver has in use now as what a phase took, if it is the most so far."""
    peaks = current_peaks()
    device = trainer.accelerator.device
    if peaks is not None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peaks.measure(phase, total - free)
