"""Look at a model when accelerate prepares it, as trainers do with policies and references alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from trl_turbo.patches import preparing
from trl_turbo.patches.blocks import mlp, norms, rope
from trl_turbo.patches.preparing import probe as probe
from trl_turbo.patching import Replacement
from trl_turbo.report import note

ADOPT: dict[str, Callable[[nn.Module], None]] = {"norms": norms.adopt, "rope": rope.adopt, "mlp": mlp.adopt}


def build(module: ModuleType, feature: str) -> Iterator[Replacement]:
    """The ways in which `Accelerator` prepares a model; what the models are made of follows as they come."""
    yield from preparing.before(
        module, lambda accelerator, model: adopt(feature, model, compiles=_compiles(accelerator))
    )


def adopt(feature: str, model: nn.Module, *, compiles: bool = False) -> None:
    """Let what `model` is made of run on our ops where it computes the same; a note says what is left alone, and why.

    Args:
        feature: `norms`, `rope` or `mlp`.
        model: The model, in any wrapper.
        compiles: Whether it is about to be compiled.
    """
    reason = _left_alone(model, compiles)
    if reason is not None:
        note(feature, f"{_name(model)}: {reason}; it is left alone")
    else:
        ADOPT[feature](model)


def _compiles(accelerator: Any) -> bool:
    """Whether an accelerator compiles what it prepares."""
    backend = getattr(getattr(accelerator.state, "dynamo_plugin", None), "backend", "NO")
    return getattr(backend, "value", backend) != "NO"


def _left_alone(model: nn.Module, compiles: bool) -> str | None:
    """Why nothing of a model is replaced, or `None`."""
    if compiles:
        return "it is about to be compiled by torch.compile, which fuses these parts itself"
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            return "it is compiled by torch.compile, which fuses these parts itself"
        if getattr(module, "use_kernels", False) is True:
            return "it was loaded with use_kernels=True and runs kernels of the hub"
    return None


def _name(model: Any) -> str:
    inner = getattr(model, "_orig_mod", model)
    return type(inner.get_base_model() if hasattr(inner, "get_base_model") else inner).__name__
