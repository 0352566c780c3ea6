"""Where transformers gives a model's layers their checkpoint function: all ways to enable it come through here.

TRL disables checkpointing before each pass without gradients and enables it again after it, PEFT's wrapper calls its
base model's, and the Trainer does it once more; what is set on the layers is ours each time.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch

from trl_turbo.patches.checkpointing import inside, offload
from trl_turbo.patching import Idle, Replacement
from trl_turbo.report import note

METHOD, ARGUMENT = "_set_gradient_checkpointing", "gradient_checkpointing_func"

# Which features are on: a model keeps the function that it was given while one was
_ON: dict[str, bool] = {}


def probe(module: ModuleType, feature: str) -> str | None:
    """Why the module does not fit, or `None`."""
    method = getattr(getattr(module, "PreTrainedModel", None), METHOD, None)
    if method is None or ARGUMENT not in inspect.signature(method).parameters:
        return f"PreTrainedModel.{METHOD} takes no {ARGUMENT}"
    return without_device() if feature == "checkpointing" else None


def without_device() -> str | None:
    """Say that nothing can be offloaded, or return `None`."""
    if offload.has_device():
        return None
    return Idle("there is no CUDA device: layers' inputs are in host memory already, and there is nothing to offload")


def build(module: ModuleType, feature: str) -> Iterator[Replacement]:
    """The one method that every way to enable checkpointing calls."""
    yield Replacement(module.PreTrainedModel, METHOD, functools.partial(_set, feature))


def switch(feature: str, *, on: bool) -> None:
    """Let the checkpoint functions that were given out do their part, or only call the original."""
    _ON[feature] = on
    if feature == "checkpointing" and not on:
        offload.release()


def _set(feature: str, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if bound.arguments.get("enable", True):
            _ON[feature] = True
            # A partial of a function of this module: copies of the model, and pickles of it, find it again
            bound.arguments[ARGUMENT] = functools.partial(_RUN[feature], bound.arguments[ARGUMENT])
        return original(*bound.args, **bound.kwargs)

    return method


def offloaded(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `checkpoint(function, *args)`, and let what it saves, the layer's input, wait in host memory."""
    with _hooks(args) if _runs("checkpointing") else nullcontext():
        return checkpoint(function, *args, **kwargs)


def marked(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `checkpoint` with a function that says, whenever it runs, that it runs in a checkpointed layer."""
    if not _runs("mlp_tiling"):
        return checkpoint(function, *args, **kwargs)
    return checkpoint(functools.partial(inside.call, function), *args, **kwargs)


_RUN: dict[str, Callable[..., Any]] = {"checkpointing": offloaded, "mlp_tiling": marked}


def _runs(feature: str) -> bool:
    return _ON.get(feature, False) and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _hooks(args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    x = next((x for x in args if isinstance(x, torch.Tensor)), None)
    if x is None:
        note("checkpointing", "a layer that takes no tensor by position keeps its input on the device")
        return nullcontext()
    offloader = offload.offloader_of(x.device)
    if offloader is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(offloader.pack, offloader.unpack)
