"""Where each gigabyte of a training goes, before it runs.

`predict` needs a model's configuration and the script's settings alone; `plan` reads both off a trainer. `sizes` is
what a model is made of, `layer` what one of its layers takes, `prediction` the sum, `table` what is shown.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_turbo.memory_plan.prediction import predict as predict
    from trl_turbo.memory_plan.table import MemoryPlan as MemoryPlan
    from trl_turbo.memory_plan.trainer import plan as plan

__all__ = ["MemoryPlan", "plan", "predict"]

# Imported when first asked for: all but the table imports torch.
_LATE = {"MemoryPlan": "table", "plan": "trainer", "predict": "prediction"}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
