"""The forward of PEFT's LoRA layers, one linear at a time."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from trl_turbo.kernels.lora import lora_linear
from trl_turbo.patches.lora.group import from_group
from trl_turbo.patches.lora.plan import Left, projection, surroundings
from trl_turbo.patching import Replacement
from trl_turbo.report import note


def probe(module: ModuleType, name: str) -> str | None:
    """Why the module does not fit, or `None`."""
    method = vars(getattr(module, name, object)).get("forward")
    if method is None or tuple(inspect.signature(method).parameters) != ("self", "x", "args", "kwargs"):
        return f"{module.__name__}.{name}.forward no longer takes (self, x, *args, **kwargs)"
    return None


def build(module: ModuleType, name: str) -> Iterator[Replacement]:
    """The layer's forward."""
    yield Replacement(getattr(module, name), "forward", make_forward)


def make_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a LoRA layer's forward: what is plain LoRA in its present state runs on our function."""

    @functools.wraps(original)
    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            note_compiled()
            return original(self, x, *args, **kwargs)
        reason = plainly_called(x, args, kwargs)
        if reason is None:
            try:
                around = surroundings(x.dtype, x.device)
                found = projection(self, x.dtype, x.device, around)
                y = from_group(self, x, found, around)
                return lora_linear(x, found) if y is None else y
            except Left as left:
                reason = str(left)
        if reason:
            note("lora", reason)
        return original(self, x, *args, **kwargs)

    return forward


def plainly_called(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call is left to PEFT, or `None`."""
    if kwargs.get("adapter_names") is not None:
        return "batches that mix adapters (adapter_names) run PEFT's own forward"
    if args or any(value is not None for value in kwargs.values()):
        return "calls with further arguments run PEFT's own forward"
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or not x.is_floating_point() or x.is_meta or x.dim() == 0:
        return ""
    if torch._C._are_functorch_transforms_active():
        return "layers under torch.func run PEFT's own forward"
    return None


@torch.compiler.assume_constant_result
def note_compiled() -> bool:
    """Note it while torch.compile traces; nothing of it is in the compiled code."""
    note("lora", "layers under torch.compile run PEFT's own forward, which it compiles")
    return True
