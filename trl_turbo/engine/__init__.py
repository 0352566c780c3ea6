"""Generation by a vLLM in the trainer's process that reads the trainer's own weights. Only this package imports vLLM.

There is one copy of the weights: vLLM's modules point at the tensors that the optimizer updates, so a training step
needs no weight sync. `llm` has the engine, `sharing` the weights, `adapter` the way an adapter is served, `sizing` the
sizes, `checks` what is declined; `pretrained` starts one over a checkpoint, for `trl_turbo.from_pretrained`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_turbo.engine.errors import EngineDeclinedError as EngineDeclinedError
    from trl_turbo.engine.llm import TurboLLM as TurboLLM
    from trl_turbo.engine.memory import MemoryReport as MemoryReport
    from trl_turbo.engine.sizing import Plan as Plan
    from trl_turbo.engine.sizing import Work as Work
    from trl_turbo.engine.sizing import plan as plan

__all__ = ["EngineDeclinedError", "MemoryReport", "Plan", "TurboLLM", "Work", "plan"]

# Imported when first asked for: most of this package imports torch.
_LATE = {
    "EngineDeclinedError": "errors",
    "MemoryReport": "memory",
    "Plan": "sizing",
    "TurboLLM": "llm",
    "Work": "sizing",
    "plan": "sizing",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
