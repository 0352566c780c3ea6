"""Which MLPs run a tile of rows at a time: gated ones, of any model, over whatever their forward is by then.

What a gated MLP keeps inside, [T, I] a few times over, is what a checkpointed layer takes most of when it is made
again. In a pass without gradients it is what there is. An MLP that our LoRA function computes goes over tiles of its
own, except under reentrant checkpointing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from trl_turbo.compat.sharded import is_zero3, own_class
from trl_turbo.kernels.lora.mlp import recomputes
from trl_turbo.memory_plan.layer import TILE_ROWS
from trl_turbo.patches import preparing
from trl_turbo.patches.blocks.classes import only_argument, runs_our_lora, runs_plainly, unreachable
from trl_turbo.patches.blocks.mlp import gated_mlps
from trl_turbo.patches.checkpointing import inside
from trl_turbo.patches.checkpointing.tiles import tiled
from trl_turbo.patches.lora.mlp import linears_of
from trl_turbo.patches.preparing import probe as probe
from trl_turbo.patching import Replacement, extend
from trl_turbo.report import note

PATCH = "mlp_tiling.models"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def build(module: ModuleType) -> Iterator[Replacement]:
    """The ways in which `Accelerator` prepares a model; the classes of MLPs follow as they come."""
    yield from preparing.before(module, lambda _, model: hook_model(model))


def hook_model(model: Any) -> None:
    """Give the classes of a model's gated MLPs a forward that runs in tiles."""
    if not isinstance(model, nn.Module):
        return
    for mlp in gated_mlps(model):
        if "forward" in vars(mlp):
            note("mlp_tiling", f"{type(mlp).__name__}, which has a forward of its own on the instance, runs whole")
        else:
            extend(PATCH, Replacement(own_class(mlp), "forward", make_forward))


def make_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an MLP's forward: long inputs pass through it in tiles, where that costs no product more."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = only_argument(args, kwargs)
        if not runs_plainly(x) or x.dim() < 2 or x.numel() // max(1, x.shape[-1]) <= TILE_ROWS:
            return original(self, *args, **kwargs)
        graded = torch.is_grad_enabled()
        if graded and not inside.checkpointed():
            return original(self, *args, **kwargs)  # it would be made again for this alone
        if linears_of(self) and runs_our_lora(type(self)) and (recomputes() or not graded):
            return original(self, *args, **kwargs)
        reason = _whole(self)
        if reason is not None:
            note("mlp_tiling", f"{type(self).__name__} {reason}: it runs whole")
            return original(self, *args, **kwargs)
        return tiled(functools.partial(original, self), x, tuple(self.parameters()), TILE_ROWS)

    return forward


def _whole(mlp: nn.Module) -> str | None:
    """Why an MLP cannot be cut, or `None`."""
    if any(map(is_zero3, mlp.parameters())):
        return "has parameters that ZeRO-3 takes apart before its tiles are made again"
    for module in mlp.modules():
        if isinstance(module, nn.Dropout) and module.p and module.training:
            return "drops out inside, and tiles would draw other numbers"
        if module is not mlp and ("forward" in vars(module) or any(getattr(module, name) for name in _HOOKS)):
            return "has hooks inside, which would see tiles"
    return unreachable(*mlp.parameters())
