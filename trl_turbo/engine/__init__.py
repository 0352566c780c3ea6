"""Generation by a vLLM in the trainer's process that reads the trainer's own weights. The only place that imports vLLM.

There is one copy of the weights: vLLM's modules point at the tensors that the optimizer updates, so a training step needs
no weight sync. `llm` has the engine, `sharing` the weights, `adapter` and `merged` the two ways to serve a LoRA adapter,
`plan` the sizes, `checks` what is declined.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_turbo.engine.errors import EngineDeclined as EngineDeclined
    from trl_turbo.engine.memory import MemoryReport as MemoryReport
    from trl_turbo.engine.plan import Plan as Plan
    from trl_turbo.engine.plan import Work as Work
    from trl_turbo.engine.plan import plan as plan

__all__ = ["EngineDeclined", "MemoryReport", "Plan", "Work", "plan"]

# Imported when first asked for: most of this package imports torch.
_LATE = {
    "EngineDeclined": "errors",
    "MemoryReport": "memory",
    "Plan": "plan",
    "Work": "plan",
    "plan": "plan",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
