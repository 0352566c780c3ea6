"""A model like one whose parameters are sharded, that one process can run alone: its modules, other numbers.

Gathering the real ones takes every process at the same point, within the owner's hooks, which a check must not disturb.
What a check asks is what a model's code does with queries, keys, values and positions; so the stand-in has the model's
own modules (adapters, modules that a script put in, hooks of others), its configuration and buffers, and random numbers
where a parameter is not whole. They are drawn alike in every process, so that all come to the same verdict.

Parameters of one shape are windows of one tensor and tables of embeddings have rows that overlap: it takes the memory
of about one layer, as the owner does to gather one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from types import MethodType
from typing import Any

import torch
from torch import nn

from trl_turbo.compat.sharded import (
    as_sharded,
    computes_in,
    is_fsdp2,
    is_owners_hook,
    is_sharded,
    is_whole,
    own_class,
    splits_more,
    whole_shape,
)
from trl_turbo.patches.attention.interface import UnsupportedAttentionError

# Windows of one tensor start so far apart, which kernels take for aligned, and so many differ
_APART, _WINDOWS = 64, 64
_PRE_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_NO_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def has_shards(model: nn.Module) -> bool:
    """Whether a model's parameters belong to FSDP2 or ZeRO-3, whole at this moment or not."""
    return any(map(is_fsdp2, model.modules())) or any(map(is_sharded, model.parameters()))


def stand_in(model: Any, device: torch.device) -> Any:
    """A model of the same modules without what shards it.

    Args:
        model: A causal language model of which some parameters are not whole. It is not changed.
        device: Where it computes; its parameters may wait elsewhere.

    Raises:
        UnsupportedAttentionError: There is none, and the reason.
    """
    numbers, dtypes = _Numbers(device), _dtypes(model)
    head = model.get_output_embeddings()
    heads = set() if head is None else set(head.modules())
    made: dict[nn.Module, nn.Module] = {}
    tied: dict[int, nn.Parameter] = {}
    for module in model.modules():
        made[module] = new = _bare(module, device)
        table = module in heads or isinstance(module, nn.Embedding)  # the head is not called
        for name, parameter in module._parameters.items():
            if parameter is None or is_whole(parameter):
                new._parameters[name] = parameter
                continue
            if id(parameter) not in tied:
                tied[id(parameter)] = numbers.like(name, parameter, dtypes[module], table)
            new._parameters[name] = tied[id(parameter)]
    vars(made[model]).pop("forward", None)  # what a trainer set: it is the class's that is asked
    for module, new in made.items():
        vars(new)["_modules"] = {name: None if m is None else made[m] for name, m in module._modules.items()}
        _lead_to(made, new)
    return made[model]


def _bare(module: nn.Module, device: torch.device) -> nn.Module:
    """A module of the same class, attributes and buffers, without parameters, children and hooks of the owner."""
    kind: Any = own_class(module)
    new: nn.Module = kind.__new__(kind)
    own = vars(new)
    own.update(vars(module))
    for name in _NO_HOOKS:
        own[name] = OrderedDict()
    for first, *others in (_PRE_HOOKS, _HOOKS):
        own[first] = OrderedDict((key, hook) for key, hook in own[first].items() if not is_owners_hook(hook))
        for name in others:
            own[name] = OrderedDict((key, value) for key, value in own[name].items() if key in own[first])
    own["_buffers"] = {name: None if buffer is None else buffer.to(device) for name, buffer in module._buffers.items()}
    own["_parameters"] = {}
    return new


def _lead_to(made: dict[nn.Module, nn.Module], new: nn.Module) -> None:
    """Let what a module holds on to beside its children be of the stand-in, too."""
    own = vars(new)
    for name, value in own.items():
        if isinstance(value, nn.Module):
            own[name] = made.get(value, value)
        elif isinstance(value, MethodType) and isinstance(value.__self__, nn.Module) and value.__self__ in made:
            own[name] = MethodType(value.__func__, made[value.__self__])
        elif name == "forward":
            raise UnsupportedAttentionError(
                f"its parameters are sharded, and its {type(new).__name__} has a forward of its own on the instance"
            )


def _dtypes(model: nn.Module) -> dict[nn.Module, torch.dtype | None]:
    """In which dtype the parameters of each module are computed with, `None` for their own.

    FSDP2 says so of each unit. What is in no unit inside the model is in the one around it, whose dtype is taken to be
    that of the others, as accelerate and TRL apply it.
    """
    units = {module: computes_in(module) for module in model.modules() if is_fsdp2(module)}
    if not units and not all(map(_owned_alone, model.parameters())):
        raise UnsupportedAttentionError("its parameters are sharded by something else than FSDP2 and ZeRO-3")
    found: dict[nn.Module, torch.dtype | None] = {}

    def walk(module: nn.Module, dtype: torch.dtype | None) -> None:
        found[module] = dtype = units.get(module, dtype)
        for child in module.children():
            walk(child, dtype)

    walk(model, next(iter(units.values()), None))
    return found


def _owned_alone(parameter: torch.Tensor) -> bool:
    """Whether a parameter is whole, or says by itself whose it is."""
    return is_whole(parameter) or hasattr(parameter, "ds_id")


class _Numbers:
    """Random parameters, of a size with which what a layer adds is neither lost nor drowns the rest."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(20)
        self._tensors: dict[Any, torch.Tensor] = {}
        self._taken: dict[Any, int] = {}

    def like(self, name: str, parameter: torch.Tensor, dtype: torch.dtype | None, table: bool) -> nn.Parameter:
        """One like a part of a parameter: of its whole shape, in the dtype that it is computed with."""
        if splits_more(parameter):
            raise UnsupportedAttentionError("its layers or sequences are split over processes, too")
        if not parameter.is_floating_point():
            raise UnsupportedAttentionError(f"its sharded parameters are not all numbers (`{name}`)")
        shape, dtype = tuple(whole_shape(parameter)), dtype or parameter.dtype
        bias, overlap = "bias" in name, table and len(shape) == 2
        key = (shape, dtype, bias, overlap)
        if key not in self._tensors:
            count = sum(shape) if overlap else math.prod(shape)
            drawn = torch.empty(count + _APART * _WINDOWS, dtype=dtype, device=self._device)
            drawn.normal_(generator=self._generator)
            if len(shape) > 1:
                drawn *= shape[-1] ** -0.5
            elif bias:
                drawn *= 0.02
            else:  # what scales
                drawn.mul_(0.1).add_(1)
            self._tensors[key] = drawn
        start = self._taken.get(key, 0) % _WINDOWS * _APART
        self._taken[key] = self._taken.get(key, 0) + 1
        window = self._tensors[key][start:]
        data = window.as_strided(shape, (1, 1)) if overlap else window[: math.prod(shape)].view(shape)
        return as_sharded(nn.Parameter(data, parameter.requires_grad), parameter)
