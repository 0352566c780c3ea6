"""Find where each checkpoint tensor lands in a vLLM model, by running vLLM's own loader on tensors without storage.

No table of fused modules for each model: `load_weights` knows where the rows of q, k and v go, that a vocabulary is
padded and what is tied. It is given meta tensors, and a dispatch mode swallows every copy from one and keeps its
destination.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trl_turbo.engine.errors import EngineDeclinedError

#: What a user should know where vLLM's own code does not fit; which path runs instead is said by who takes it.
UNTOUCHED = "nothing was changed, and training is as right without sharing"


@dataclass(frozen=True)
class Shape:
    """What a checkpoint tensor is: `dims` and `dtype`."""

    dims: torch.Size
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{_short(self.dtype)} {list(self.dims)}"


@dataclass(frozen=True)
class Destination:
    """A contiguous run of elements in a vLLM parameter.

    Attributes:
        parameter: Name of the vLLM parameter.
        offset: Its first element, counted from the start of the parameter's storage.
    """

    parameter: str
    offset: int


class _Recorder(TorchDispatchMode):
    """Swallows copies from meta tensors and keeps them by the storage they came from."""

    def __init__(self) -> None:
        super().__init__()
        self.name_of: dict[int, str] = {}
        self.copies: dict[str | None, list[tuple[Tensor, Tensor]]] = {}
        self._alive: list[Tensor] = []  # a storage that is freed gives its id to the next one

    def probes(self, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            probe = torch.empty(shape.dims, dtype=shape.dtype, device="meta")
            self.name_of[probe.untyped_storage()._cdata] = name
            self._alive.append(probe)
            yield name, probe

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_meta:
            into, source = args[0], args[1]
            name = self.name_of.get(source.untyped_storage()._cdata)
            self.copies.setdefault(name, []).append((into, source))
            self._alive.append(source)
            return into
        if func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default) and not args[0].is_meta:
            return args[0]  # the padding of a vocabulary: it is filled when the storage is made
        return func(*args, **(kwargs or {}))


def trace(vllm_model: nn.Module, shapes: Mapping[str, Shape]) -> dict[str, Destination]:
    """Say where each checkpoint tensor lands.

    Args:
        vllm_model: A model of vLLM; neither its values nor its storages are touched.
        shapes: Checkpoint name to shape and dtype.

    Returns:
        Checkpoint name to destination, for all of them.

    Raises:
        EngineDeclinedError: A tensor does not land in one contiguous place of its dtype, or the loader reads values.
    """
    recorder = _Recorder()
    try:
        with recorder, torch.no_grad():
            vllm_model.load_weights(recorder.probes(shapes))  # type: ignore[operator]
    except Exception as error:
        raise EngineDeclinedError(
            f"vLLM's loader for {type(vllm_model).__name__} cannot be followed without values "
            f"({type(error).__name__}: {error}); {UNTOUCHED}"
        ) from error
    if None in recorder.copies:
        raise EngineDeclinedError(
            f"vLLM's loader for {type(vllm_model).__name__} computes {len(recorder.copies[None])} of its weights from "
            f"the checkpoint's, so they cannot be the same tensors; {UNTOUCHED}"
        )
    owners = {p.data.untyped_storage()._cdata: name for name, p in vllm_model.named_parameters()}
    return {name: _destination(name, shape, recorder.copies.get(name, []), owners) for name, shape in shapes.items()}


def _destination(
    name: str, shape: Shape, copies: list[tuple[Tensor, Tensor]], owners: Mapping[int, str]
) -> Destination:
    covered = sum(source.numel() for _, source in copies)
    if covered != shape.dims.numel():
        raise EngineDeclinedError(
            f"vLLM takes {covered} of the {shape.dims.numel()} elements of {name}, so it cannot read the trainer's "
            f"tensor; {UNTOUCHED}"
        )
    storages = {into.untyped_storage()._cdata for into, _ in copies}
    # Where a copy starts, minus where its source does: the same for all copies of a tensor that stays in one piece
    offsets = {int(into.storage_offset()) - int(source.storage_offset()) for into, source in copies}
    reordered = any(_strides(into) != _strides(source) for into, source in copies)
    if len(storages) != 1 or len(offsets) != 1 or reordered:
        raise EngineDeclinedError(
            f"vLLM keeps {name} in another layout, {len(copies)} pieces in {len(storages)} tensors, as its backend "
            f"for mixtures of experts or quantised weights does; {UNTOUCHED}"
        )
    into = copies[0][0]
    if into.dtype != shape.dtype:
        raise EngineDeclinedError(
            f"{name} is {_short(shape.dtype)} in training and {_short(into.dtype)} in vLLM; load the model in one dtype"
        )
    owner = owners.get(storages.pop())
    if owner is None:
        raise EngineDeclinedError(
            f"vLLM puts {name} into a tensor that is no parameter of its model, so it cannot be the trainer's; "
            f"{UNTOUCHED}"
        )
    return Destination(owner, offsets.pop())


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that matter: the stride of a dimension of size 1 is arbitrary."""
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
