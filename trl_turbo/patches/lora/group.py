"""The projections of attention in one function, though the model's code calls them one by one.

While an attention module's forward runs, the first of its projections that is called computes all of them; the others
then give out what is there. What a projection gives out is what it would compute, or is not given out: the input must
be the very same tensor, not written to since, gradients and autocast on or off as they were, and the layer's adapters,
weights, scalings and dropout as they were. What is left over lives no longer than the forward of the module, however
that ends: gradient checkpointing ends a recomputed forward by an exception, and another thread has a group of its own.
Hooks on the projections themselves run as ever, since the projections are called as ever.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trl_turbo.kernels.lora import Projection, lora_qkv, together
from trl_turbo.patches.lora.plan import Left, Surroundings, is_lora, projection
from trl_turbo.report import note

NAMES = ("q_proj", "k_proj", "v_proj")

_local = threading.local()
# Of attention to something else than its own input, as in a decoder over an encoder
_OTHER_INPUTS = frozenset({"key_value_states", "encoder_hidden_states"})


class _Group:
    """One call of an attention module.

    Attributes:
        members: Its LoRA projections, in the order in which they are called.
        outputs: What was computed and not given out, by the identity of the layer.
    """

    def __init__(self, members: tuple[nn.Module, ...]) -> None:
        self.members = members
        self.x: torch.Tensor | None = None
        self.state: tuple[Any, ...] = ()
        self.outputs: dict[int, tuple[Projection, list[int], torch.Tensor]] = {}


def members_of(module: nn.Module) -> tuple[nn.Module, ...]:
    """The LoRA layers among a module's projections of one input."""
    modules = module._modules
    return tuple([m for name in NAMES if (m := modules.get(name)) is not None and is_lora(m)])


def has_one_input(module: nn.Module) -> bool:
    """Whether an attention module is told of no other input than its own."""
    return not _OTHER_INPUTS & inspect.signature(type(module).forward).parameters.keys()


def make_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an attention module's forward: its projections are computed together."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        members = members_of(self)
        if len(members) < 2:
            return original(self, *args, **kwargs)
        outer = getattr(_local, "group", None)
        group = _local.group = _Group(members)
        try:
            answer = original(self, *args, **kwargs)
        finally:
            _local.group = outer
        if group.outputs:
            # It goes on so: gradient checkpointing must find in a recomputed forward what the first one did
            note("lora", f"some projections of {type(self).__name__} are not called with the input of the others")
        return answer

    return forward


def from_group(layer: Any, x: torch.Tensor, found: Projection, around: Surroundings) -> torch.Tensor | None:
    """What `layer` makes of x [..., in], computed with the others of its group; `None` where it is not.

    Args:
        layer: Whose forward runs.
        x: Its input.
        found: Its projection.
        around: In which that was found.
    """
    group: _Group | None = getattr(_local, "group", None)
    if group is None or layer not in group.members or x.is_inference():
        return None
    state = (id(x), x._version, torch.is_grad_enabled(), x.requires_grad)
    if group.x is not None:
        made = group.outputs.get(id(layer))
        if made is None or group.x is not x or group.state != state:
            return None
        if made[0] is not found or made[1] != together(found).versions():
            return None
        del group.outputs[id(layer)]
        return made[2]
    if group.members[0] is not layer:
        return None
    projections = [found]
    try:
        projections += [projection(member, x.dtype, x.device, around) for member in group.members[1:]]
    except Left:
        return None
    if len({p.compute for p in projections}) > 1:
        return None
    outputs = lora_qkv(x, *projections)
    group.x, group.state = x, state
    for member, other, y in zip(group.members[1:], projections[1:], outputs[1:], strict=True):
        group.outputs[id(member)] = other, together(other).versions(), y
    return outputs[0]
