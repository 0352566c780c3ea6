"""Build vLLM's modules without storage, and give them the trainer's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trl_turbo.engine.destinations import UNTOUCHED, Destination
from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.engine.names import Slot

_BARE = "_trl_turbo_bare"
# Freed tensors of two projections have no room for one of both: torch's cache would grow by all that was copied
_CACHED_BYTES = 128 << 20


@contextmanager
def without_storage() -> Iterator[None]:
    """While open, each matrix that a module registers gives its memory back at once.

    What it then points at is host memory that nobody writes, so that the system never provides it. The meta device
    would do the same for weights, but would lose what constructors compute, such as rotary tables.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        kept = module._parameters.get(name)
        # Vectors stay: they are small, and a constructor may have filled them.
        if kept is not None and kept.dim() >= 2 and not getattr(kept, _BARE, False):
            setattr(kept, _BARE, True)
            kept.data = torch.empty(kept.shape, dtype=kept.data.dtype, device="cpu")

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def adopt(
    vllm_model: nn.Module, slots: Mapping[str, Slot], destinations: Mapping[str, Destination]
) -> dict[str, nn.Parameter]:
    """Let every vLLM parameter and the trainer's tensors in it be the same memory.

    A tensor that fills its vLLM parameter is adopted where it lies. Those that share one (q, k and v; gate and up; a
    vocabulary that vLLM pads) are copied into one allocation, once, and the trainer's parameters become views of it:
    the `Parameter` objects stay, so optimizers, hooks and adapters keep working.

    Args:
        vllm_model: vLLM's model.
        slots: Checkpoint name to where the trainer keeps it.
        destinations: Checkpoint name to where vLLM wants it.

    Returns:
        The vLLM parameters that now hold the trainer's weights, by name.

    Raises:
        EngineDeclinedError: A parameter of vLLM's takes no tensor of the trainer; nothing was changed then.
    """
    owners, groups = _owners(vllm_model, destinations)
    freed = 0
    with torch.no_grad():
        for owner, names in groups.items():
            freed += _join(owners[owner], [(slots[n].parameter, destinations[n].offset) for n in names])
            if freed >= _CACHED_BYTES:
                torch.cuda.empty_cache()
                freed = 0
    return owners


def point(
    vllm_model: nn.Module, slots: Mapping[str, Slot], destinations: Mapping[str, Destination]
) -> dict[str, nn.Parameter]:
    """Let the trainer's tensors, which have no values, be those that vLLM has loaded; the other way round of `adopt`.

    Raises:
        EngineDeclinedError: A parameter of vLLM's takes no tensor of the trainer; nothing was changed then.
    """
    owners, _ = _owners(vllm_model, destinations)
    for name, destination in destinations.items():
        parameter = slots[name].parameter
        parameter.data = part(owners[destination.parameter].data, parameter.shape, destination.offset)
    return owners


def _owners(
    vllm_model: nn.Module, destinations: Mapping[str, Destination]
) -> tuple[dict[str, nn.Parameter], dict[str, list[str]]]:
    """The vLLM parameters that take weights, by name, and the names of those weights."""
    parameters: dict[str, nn.Parameter] = dict(vllm_model.named_parameters())
    groups: dict[str, list[str]] = {}
    for name, destination in destinations.items():
        groups.setdefault(destination.parameter, []).append(name)
    bare = sorted(n for n, p in parameters.items() if n not in groups and p.dim() >= 2)
    if bare:
        raise EngineDeclinedError(
            f"vLLM's {bare[0]} takes no weight of the model ({len(bare)} such), as in derived copies; {UNTOUCHED}"
        )
    return {owner: parameters[owner] for owner in groups}, groups


def _join(parameter: nn.Parameter, members: list[tuple[nn.Parameter, int]]) -> int:
    """Returns the bytes of tensors that were copied and freed."""
    first = members[0][0].data
    if len(members) == 1 and first.numel() == parameter.data.numel() and first.is_contiguous():
        parameter.data = first.view(parameter.data.shape)
        return 0
    covered = sum(member.data.numel() for member, _ in members)
    make = torch.empty if covered == parameter.data.numel() else torch.zeros
    # `.data.dtype`: in-tree bitsandbytes parameters report another one
    whole = make(parameter.data.shape, dtype=parameter.data.dtype, device=first.device)
    for member, offset in members:
        view = part(whole, member.shape, offset)
        view.copy_(member.data)
        member.data = view  # frees the separate tensor
    parameter.data = whole
    return covered * whole.element_size()


def part(whole: Tensor, shape: Any, offset: int) -> Tensor:
    """The elements of `whole` from `offset` on, contiguous, as `shape`."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return whole.as_strided(tuple(shape), tuple(reversed(strides)), whole.storage_offset() + offset)
