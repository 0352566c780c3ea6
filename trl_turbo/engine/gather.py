"""Whole tensors of parameters of which each rank may keep a part only: DTensor's shards (FSDP2) and ZeRO stage 3's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def whole(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the whole tensors of these parameters, for reading; those that are no shards as they are.

    Every rank must enter with the same parameters in the same order: gathering is a collective.
    """
    with _assembled(parameters):
        yield [_full(parameter) for parameter in parameters]


@contextmanager
def assembled(model: nn.Module) -> Iterator[None]:
    """While open, a model that ZeRO stage 3 shards can be called as it is: a block is whole while it runs.

    FSDP2's modules gather what they need themselves. Every rank must enter, and call the model as often as the others.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    blocks = _blocks(model)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    around = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    with ExitStack() as stack:
        # Whole blocks, not single modules: a kernel of ours reads weights without calling the module that has them
        for block in blocks:
            now = stack.enter_context(ExitStack())
            stack.callback(block.register_forward_pre_hook(_opens(now)).remove)
            stack.callback(block.register_forward_hook(lambda *_, now=now: now.close()).remove)
        stack.enter_context(_assembled(around))
        yield


def _opens(now: ExitStack) -> Any:
    def before(block: nn.Module, _: Any) -> None:
        now.enter_context(_assembled(list(block.parameters())))

    return before


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules: a transformer's layers."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in _blocks(child)]


@contextmanager
def _assembled(parameters: Sequence[Tensor]) -> Iterator[None]:
    shards = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not shards:
        yield
        return
    import deepspeed  # type: ignore[import-not-found, unused-ignore]

    with deepspeed.zero.GatheredParameters(shards):
        yield


def _full(parameter: Tensor) -> Tensor:
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return parameter.detach()
    shard: Any = parameter.detach()
    if shard.device.type != mesh.device_type:
        shard = shard.to(mesh.device_type)  # CPU offload: the group's backend moves tensors of its own device
    return shard.full_tensor()


def agreed(reason: str | None) -> str | None:
    """The first reason that any rank of the job has, or `None`; the same answer on each. Every rank must call it."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return reason
    ranks = torch.distributed.get_world_size()
    reasons: list[str | None] = [None] * ranks
    torch.distributed.all_gather_object(reasons, reason)
    found = next(((rank, text) for rank, text in enumerate(reasons) if text is not None), None)
    if found is None:
        return None
    return found[1] if ranks == 1 else f"on rank {found[0]}, {found[1]}"
