"""Gated MLPs of any model: their own linears, adapters and all, and `gated` between them."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn

from trl_turbo.kernels.gated import ACTIVATIONS, gated
from trl_turbo.patches.blocks.agreement import choose, generator
from trl_turbo.patches.blocks.classes import (
    Forward,
    State,
    Verdicts,
    adopt_classes,
    only_argument,
    plain_attributes,
    runs_plainly,
    stand_in,
)

_LLAMA = ("gate_proj", "up_proj", "down_proj")
_PHI3 = ("gate_up_proj", "down_proj")
_ACTIVATION_NAMES = ("act_fn", "activation_fn")
_SHAPE = (2, 64, 96)


def adopt(model: nn.Module) -> None:
    """Let the classes of `model`'s gated MLPs run our op where they compute what it does."""
    adopt_classes(gated_mlps(model), GatedVerdicts, make_forward, _sample)


class GatedVerdicts(Verdicts[str]):
    """Which activation the MLPs of one class gate with."""

    feature = "mlp"

    def mark(self, module: Any) -> Hashable:
        """The activation itself."""
        return _activation(module)

    def traits(self, module: Any) -> Hashable:
        """What the activation is, which each layer has one of its own of."""
        act = _activation(module)
        return (type(act), plain_attributes(act)) if isinstance(act, nn.Module) else act

    def decide(self, module: Any, state: State) -> tuple[str | None, str]:
        """The activation with which all that stands between the linears is `gated`."""
        dtype = state.autocast or state.dtype
        numbers = generator()
        inputs = [torch.randn(_SHAPE, generator=numbers).mul(2).to(state.device, dtype) for _ in range(2)]
        original = functools.partial(self._between, module, _SHAPE, state.device)
        candidates = {name: functools.partial(gated, activation=name) for name in ACTIVATIONS}
        return choose(original, candidates, inputs, differentiable=2)

    def _between(
        self, module: Any, shape: tuple[int, ...], device: torch.device, gate: torch.Tensor, up: torch.Tensor
    ) -> torch.Tensor:
        """What the original hands to its last linear where its first ones answer `gate` and `up` [..., I]."""
        x = torch.zeros(shape, device=device, dtype=gate.dtype)
        last = _Linear(None, None)
        if _is_llama(module):
            firsts = {"gate_proj": _Linear(x, gate), "up_proj": _Linear(x, up)}
        else:
            firsts = {"gate_up_proj": _Linear(x, torch.cat((gate, up), -1))}
        returned = self.original(stand_in(module, **firsts, down_proj=last), x)
        if returned is not last.answer or any(linear.calls != 1 for linear in (*firsts.values(), last)):
            raise ValueError("its linears are not called once each, the last one at the end")
        return last.seen


class _Linear(nn.Module):
    """Stands for a linear: takes `expected` (anything where that is `None`) and answers `answer`."""

    def __init__(self, expected: torch.Tensor | None, answer: torch.Tensor | None) -> None:
        super().__init__()
        self.expected, self.answer, self.calls = expected, answer, 0
        self.seen = torch.empty(0)

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        if self.expected is not None and x is not self.expected:
            raise ValueError("its first linears are not called with its input itself")
        if self.expected is None:
            self.seen, self.answer = x, torch.empty(0)
        return self.answer


def make_forward(original: Forward) -> Forward:
    """Wrap an MLP's forward so that it keeps no more than gate and up between its own linears."""
    verdicts = GatedVerdicts(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = only_argument(args, kwargs)
        act = _activation(self)
        if not runs_plainly(x) or getattr(act, "_forward_hooks", None) or getattr(act, "_forward_pre_hooks", None):
            return original(self, *args, **kwargs)
        state = State.of(self, x)
        activation = verdicts.form(self, state)
        if activation is None:
            return original(self, *args, **kwargs)
        if _is_llama(self):
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        if gate.dtype == up.dtype == (state.autocast or state.dtype) and runs_plainly(gate) and runs_plainly(up):
            return self.down_proj(gated(gate, up, activation))
        # Linears that answer in another dtype than was checked (some quantised ones do): the original's own product,
        # since running all of it would draw the dropout of adapters twice
        return self.down_proj(act(gate) * up)

    forward.__dict__["verdicts"] = verdicts
    return forward


def gated_mlps(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of `model` that have the linears and the activation of a gated MLP."""
    """The modules of `model` that have the linears and the activation of a gated MLP."""
    for module in model.modules():
        names = module._modules
        if (all(n in names for n in _LLAMA) or all(n in names for n in _PHI3)) and _activation(module) is not None:
            yield module


def _is_llama(module: nn.Module) -> bool:
    return "gate_proj" in module._modules


def _activation(module: nn.Module) -> Any:
    for name in _ACTIVATION_NAMES:
        found = module._modules.get(name) or vars(module).get(name)
        if found is not None:
            return found
    return None


def _sample(module: nn.Module) -> torch.Tensor:
    """A tensor in the dtype that the linears compute in: a quantised base stores another."""
    parameters = list(module.parameters())
    floating = next((p for p in parameters if p.is_floating_point() and p.element_size() > 1), None)
    return floating if floating is not None else torch.empty(0, device=parameters[0].device)
