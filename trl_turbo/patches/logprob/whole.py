"""Where the parameters of an output head are whole: here, or within a call of the head by which its owner gathers them.

- FSDP2, as accelerate and TRL apply it, keeps the head whole from its call to the end of the model's backward: what was
  gathered for the call is used. A head that is a unit of its own and taken apart after its call is called once more.
- ZeRO-3 gathers a module's parameters for its call and takes them apart after it: the call that the model makes is
  answered without its hooks, and the head is called once, for the scoring.

In either case the kernel reads, and gives a gradient to, the parameter that the owner shows within the module's call,
and the owner's own hooks gather for backward and reduce the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trl_turbo.compat.heads import Head, active_copy, describe_head
from trl_turbo.compat.sharded import foreign_hooks, gathers, is_sharded, is_whole, is_zero3
from trl_turbo.patches.logprob.pending import UnsupportedLogitsOp

Score = Callable[[Head, torch.Tensor], dict[str, torch.Tensor]]


def instead_of(module: nn.Module) -> str:
    """What of a head does not run while the model calls it: its forward, or under ZeRO-3 its hooks as well."""
    return "_call_impl" if any(map(is_zero3, module.parameters())) else "forward"


def where_whole(
    module: nn.Module,
    hidden: torch.Tensor,  # [..., H]
    score: Score,
) -> dict[str, torch.Tensor]:
    """What `score(head, hidden)` answers where the head's parameters are whole.

    Args:
        module: The head, which the model has called.
        hidden: What it was called with.
        score: Called once.

    Raises:
        UnsupportedLogitsOp: They are sharded, and the head cannot be called for them.
    """
    if not any(map(is_sharded, module.parameters())):
        return score(describe_head(module), hidden)
    called: Any = module
    if any(map(is_zero3, module.parameters())):
        called = active_copy(module)  # ZeRO-3 gathers what a module has itself, and not what is further in
    if called is None or not gathers(called):
        raise UnsupportedLogitsOp("the head's parameters are sharded, and no hook of the head gathers them")
    if foreign_hooks(module) or foreign_hooks(called):
        raise UnsupportedLogitsOp("the head's parameters are sharded, and it has hooks that must not run twice")
    found: dict[str, torch.Tensor] = {}

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with on_instance(called, "forward", own):  # for the head to look as it does without us
            head = describe_head(module)
            parts = [x for x in (head.weight, head.bias, head.adapter_weight) if x is not None]
            if head.weight is None or not all(map(is_whole, parts)):
                raise UnsupportedLogitsOp(head.reason or "the head's parameters are sharded, also while it is called")
            found.update(score(head, hidden))
        return tuple(value for value in found.values() if value.is_floating_point())

    own = vars(called).get("forward")
    with on_instance(called, "forward", forward):
        answers = iter(called(hidden))  # as the owner's hooks return them
    return {name: next(answers) if value.is_floating_point() else value for name, value in found.items()}


@contextmanager
def on_instance(module: nn.Module, name: str, method: Any) -> Iterator[None]:
    """Within this scope a module has a method of its own, which nn.Module calls first; `None` is its class's."""
    before = vars(module).get(name)
    _set(module, name, method)
    try:
        yield
    finally:
        _set(module, name, before)


def _set(module: nn.Module, name: str, method: Any) -> None:
    if method is None:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = method
