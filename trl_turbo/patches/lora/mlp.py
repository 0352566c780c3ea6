"""Gated MLPs with adapters, down(act(gate(x)) * up(x)), in one function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trl_turbo.kernels.lora import lora_mlp
from trl_turbo.patches.blocks.classes import State, only_argument
from trl_turbo.patches.blocks.mlp import GatedVerdicts
from trl_turbo.patches.lora.layers import plainly_called
from trl_turbo.patches.lora.plan import Left, hooked, is_lora, projection, surroundings
from trl_turbo.report import note

NAMES = ("gate_proj", "up_proj", "down_proj")


class LoraVerdicts(GatedVerdicts):
    """Which activation stands between the linears, for the notes of this feature."""

    feature = "lora"


def linears_of(module: nn.Module) -> tuple[nn.Module, ...]:
    """The three linears where at least one has an adapter, else none."""
    modules = module._modules
    found = tuple([m for name in NAMES if (m := modules.get(name)) is not None])
    return found if len(found) == len(NAMES) and any(map(is_lora, found)) else ()


def make_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an MLP's forward: all of it is one function where its linears are plain LoRA now."""
    verdicts = LoraVerdicts(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = only_argument(args, kwargs)
        linears = () if torch.compiler.is_compiling() else linears_of(self)
        if not linears or plainly_called(x, (), {}) is not None:
            return original(self, *args, **kwargs)
        act: Any = verdicts.mark(self)
        if hooked(*linears) or (isinstance(act, nn.Module) and (hooked(act) or _has_parameters(act))):
            note("lora", "MLPs with hooks inside run linear by linear")
            return original(self, *args, **kwargs)
        try:
            dtype, device = x.dtype, x.device
            around = surroundings(dtype, device)
            gate, up = [projection(linear, dtype, device, around) for linear in linears[:2]]
            down = projection(linears[2], gate.result, device, around if gate.result == dtype else None)
        except Left:  # the layer that is left notes why
            return original(self, *args, **kwargs)
        state = State.of(self, x)
        halves_fit = gate.result == up.result == (state.autocast or state.dtype)
        computes_fit = gate.compute == up.compute or not (gate.adapters and up.adapters)
        activation = verdicts.form(self, state) if halves_fit and computes_fit else None
        if activation is None:
            return original(self, *args, **kwargs)
        return lora_mlp(x, gate, up, down, activation)

    return forward


def _has_parameters(act: nn.Module) -> bool:
    if not act._parameters and not act._modules:  # as those of most models; asked in each pass
        return False
    return any(True for _ in act.parameters())
