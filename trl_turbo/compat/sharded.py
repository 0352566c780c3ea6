"""Parameters that a process holds a part of: FSDP2's DTensors and DeepSpeed ZeRO-3's partitions.

Both make a module's own parameters whole while it is called through `__call__`, by hooks, and take them apart after it:
FSDP2 shows other parameters then, ZeRO-3 fills the same ones. Who reads a weight must do so inside of such a call.
Known by what they carry, so that neither package is imported for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_zero3(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 owns a parameter, whole at this moment or not."""
    return hasattr(tensor, "ds_id")


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, as FSDP2's parameters are while they are not whole."""
    return type(tensor.data).__name__ == "DTensor"


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a parameter is a part now, or may be by the time of its backward."""
    return is_zero3(tensor) or is_dtensor(tensor)


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether a parameter can be computed with at this moment."""
    return not is_dtensor(tensor) and (not is_zero3(tensor) or tensor.shape == whole_shape(tensor))


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of all of a parameter; a DTensor says that of its own."""
    return getattr(tensor, "ds_shape", tensor.shape)


def own_class(module: nn.Module) -> type:
    """A module's class without the one that FSDP2 puts in front of it, which has no methods of the model's own."""
    kind = type(module)
    return kind.__bases__[1] if is_fsdp2(module) else kind


def is_fsdp2(module: Any) -> bool:
    """Whether `fully_shard` was applied to a module itself."""
    bases = type(module).__bases__
    return len(bases) == 2 and bases[0].__name__ == "FSDPModule"


def computes_in(unit: Any) -> torch.dtype | None:
    """What FSDP2 casts the parameters of one of its units to when it gathers them, `None` where they stay as they are.

    torch has no public way to ask (`FSDPModule` of torch 2.6 to 2.13).
    """
    dtype: torch.dtype | None = unit._get_fsdp_state()._mp_policy.param_dtype
    return dtype


def splits_more(tensor: Any) -> bool:
    """Whether a DTensor's mesh is also that of tensor, context or sequence parallelism, by accelerate's names."""
    names = getattr(getattr(tensor, "device_mesh", None), "mesh_dim_names", None) or ()
    return any({"tp", "cp", "sp"} & set(name.split("_")) for name in names)


def as_sharded(whole: nn.Parameter, parameter: torch.Tensor) -> nn.Parameter:
    """Let a whole tensor pass for one that ZeRO-3 has gathered, where that is what it stands for."""
    if is_zero3(parameter):
        vars(whole).update(ds_id=vars(parameter)["ds_id"], ds_shape=whole_shape(parameter))
    return whole


def gathers(module: nn.Module) -> bool:
    """Whether calling a module makes its own parameters whole."""
    return any(map(is_owners_hook, (*module._forward_pre_hooks.values(), *module._forward_hooks.values())))


def foreign_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks beside those that make its parameters whole."""
    return not all(map(is_owners_hook, (*module._forward_pre_hooks.values(), *module._forward_hooks.values())))


def is_owners_hook(hook: Any) -> bool:
    """Whether a hook is FSDP2's or DeepSpeed's."""
    return str(getattr(hook, "__module__", "")).startswith(("torch.distributed.", "deepspeed."))
