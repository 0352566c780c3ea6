"""What is said when memory runs out: the plan, what overflowed, the one setting to change, and where to resume."""

from __future__ import annotations

import gc
import traceback
from typing import Any

import torch

from trl_turbo.memory_plan.table import MemoryPlan
from trl_turbo.memory_plan.trainer import planned
from trl_turbo.patches.memory.resumable import Point, left_behind

GIB = 1 << 30
_TOLD = "trl_turbo: out of memory"


def is_told(error: BaseException) -> bool:
    """Whether an error has our words already."""
    return _TOLD in str(error)


def told(
    trainer: Any, error: torch.OutOfMemoryError, phase: str, point: Point | None, since: float
) -> torch.OutOfMemoryError:
    """The same error with the plan in its message; gradients are dropped, and the last completed step is saved.

    Args:
        trainer: The trainer.
        error: What was raised; its first words stay the first, which some who catch it look for.
        phase: `"rollout"` or `"training"`.
        point: Where the trainer stood before the step; `None` where its state may be half updated.
        since: When its run began.
    """
    found, reason = planned(trainer)
    # What the failed step made is in the frames that it left
    traceback.clear_frames(error.__traceback__)
    trainer.model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    where = left_behind(trainer, point, since)
    lines = [str(error), "", f"{_TOLD} in {phase}, after {trainer.state.global_step} steps."]
    lines += [reason] if found is None else [_overflowed(found, phase), str(found)]
    return type(error)("\n".join([*lines, f"The run: {where}."]))


def _overflowed(plan: MemoryPlan, phase: str) -> str:
    moment, part = plan.largest_part(phase if plan.phase_bytes(phase) is not None else None)
    size, total = plan.moments[moment][part], plan.total(moment)
    room = f" of the device's {plan.gpu_bytes / GIB:.1f} GiB" if plan.gpu_bytes is not None else ""
    return (
        f"In {moment}, {part} would take {size / GIB:.2f} of {total / GIB:.2f} GiB planned{room}; "
        f"what to change: {plan.remedy(moment, part)}."
    )
