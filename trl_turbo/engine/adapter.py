"""A PEFT adapter in vLLM's own buffers, updated in place from memory.

vLLM is told of the adapter once, without weights: no file, no copy of the adapter on the host. What it multiplies by
are its slot buffers, whose addresses CUDA graphs hold, so a push copies into them and never replaces them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trl_turbo.engine.adapter_config import active_adapter, adapter_layers
from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.engine.gather import whole
from trl_turbo.engine.names import Slot, base_model, base_weights
from trl_turbo.engine.slices import Cut, cuts
from trl_turbo.kernels.lora_fold import LoraLayer

#: Ranks that vLLM has buffers for; the next larger one is taken.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_ID = 1
_PATH = "memory://trl_turbo"


def llm_kwargs(model: Any, spare_rank: int = 0) -> dict[str, Any]:
    """What `LLM` needs to be able to serve the model's adapter.

    Args:
        model: A transformers model, wrapped by PEFT or not.
        spare_rank: Rank to make room for in every linear, for an adapter that comes later; 0 for the present one alone.

    Raises:
        EngineDeclinedError: The rank is larger than vLLM's buffers.
    """
    name = active_adapter(model)
    layers = adapter_layers(model, name) if name is not None else {}
    highest = max([spare_rank, *_ranks(layers, name)])
    if not highest:
        return {}
    rank = next((r for r in RANKS if r >= highest), None)
    if rank is None:
        raise EngineDeclinedError(
            f"the adapter has rank {highest} and vLLM serves ranks up to {RANKS[-1]}; lower r to {RANKS[-1]} or less"
        )
    kwargs: dict[str, Any] = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank}
    from vllm.engine.arg_utils import EngineArgs

    if (
        "lora_target_modules" in EngineArgs.__dataclass_fields__
    ):  # older ones wrap every linear, embeddings and the head
        leaves = map(_leaf, _linears(model)) if spare_rank else (layer.rpartition(".")[2] for layer in layers)
        kwargs["lora_target_modules"] = sorted(set(leaves))
    return kwargs


def buffer_bytes(model: Any, llm_kwargs: Mapping[str, Any], itemsize: int) -> int:
    """About how much vLLM's adapter buffers take, in one slot.

    Args:
        model: A transformers model, wrapped by PEFT or not.
        llm_kwargs: What `LLM` is started with.
        itemsize: Bytes of one element.
    """
    rank = llm_kwargs.get("max_lora_rank")
    if not llm_kwargs.get("enable_lora") or not rank:
        return 0
    leaves = llm_kwargs.get("lora_target_modules")
    linears: list[Any] = [s.module for s in _linears(model) if leaves is None or _leaf(s) in leaves]
    return rank * itemsize * sum(int(linear.in_features + linear.out_features) for linear in linears)


def _ranks(layers: Mapping[str, Any], name: str | None) -> list[int]:
    # Not told by the tensors' shapes: ZeRO stage 3 leaves empty ones
    return [int(layer.r[name]) for layer in layers.values()]


def _linears(model: Any) -> list[Slot]:
    """The linears on which an adapter can be served: all but the head."""
    head = base_model(model).get_output_embeddings()
    slots = base_weights(model).values()
    return [s for s in slots if isinstance(s.module, nn.Linear) and s.leaf == "weight" and s.module is not head]


def _leaf(slot: Slot) -> str:
    return slot.name.split(".")[-2]


@dataclass(frozen=True)
class _Target:
    """One LoRA layer of PEFT's and its places in vLLM.

    Attributes:
        layer: PEFT's.
        rank: r.
        room_a: vLLM's buffer for A, [R, in] or this rank's columns of it; zero from r on.
        room_b: The same for B, [out, R] or this rank's rows of it.
        columns: Which columns those are.
        rows: Which rows.
        weight: What vLLM multiplies by, [out, in] or this rank's part; `None` where that is no matrix in 16 or 32 bits.
    """

    layer: Any
    rank: int
    room_a: Tensor
    room_b: Tensor
    columns: Cut
    rows: Cut
    weight: Tensor | None

    @property
    def a(self) -> Tensor:
        """Where A goes, [r, in]."""
        return self.room_a[: self.rank]

    @property
    def b(self) -> Tensor:
        """Where B goes, [out, r]."""
        return self.room_b[:, : self.rank]


class ServedAdapter:
    """The trainer's adapter in one pinned slot of a vLLM.

    Args:
        model: The trainer's PEFT model.
        manager: vLLM's `WorkerLoRAManager` in this process.

    Raises:
        EngineDeclinedError: vLLM has no place for one of its layers.
    """

    def __init__(self, model: Any, manager: Any) -> None:
        from vllm.lora.request import LoRARequest

        name = active_adapter(model)
        if name is None:
            raise EngineDeclinedError("the model has no adapter to serve")
        layers = adapter_layers(model, name)
        highest, room = max(_ranks(layers, name)), manager.lora_config.max_lora_rank
        if highest > room:
            raise EngineDeclinedError(
                f"the adapter has rank {highest} and the engine was started with max_lora_rank={room}; load the model "
                f"with max_lora_rank={highest}"
            )
        self.name = name
        self.request = LoRARequest(lora_name="trl_turbo", lora_int_id=_ID, lora_path=_PATH)
        self._manager = manager
        self._register()
        self._targets = self._find(layers)

    @property
    def nbytes(self) -> int:
        """Bytes of vLLM's adapter buffers, all slots."""
        buffers: dict[int, int] = {}
        for module in self._manager._adapter_manager.modules.values():
            for stacked in (module.lora_a_stacked, module.lora_b_stacked):
                for tensor in stacked if isinstance(stacked, (tuple, list)) else (stacked,):
                    buffers[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return sum(buffers.values())

    @property
    def unfoldable(self) -> str | None:
        """Why the adapter cannot be folded into vLLM's own base, in a few words, or `None`."""
        for target in self._targets:
            if target.weight is None:
                return "vLLM keeps a layer's weight as something else than a matrix in 16 or 32 bits"
        return None

    def layers(self) -> list[LoraLayer]:
        """What vLLM multiplies by, a rank's own part of it, with the adapter as it was pushed last."""
        return [LoraLayer(t.weight, t.room_a, t.room_b, 1.0) for t in self._targets if t.weight is not None]

    @torch.no_grad()
    def push(self) -> None:
        """Copy the adapter as it is now into vLLM's buffers, scaled. Call after each optimizer step, on every rank.

        Raises:
            EngineDeclinedError: vLLM has dropped the adapter from its slot.
        """
        if self._slot() is None:
            raise EngineDeclinedError(
                "vLLM dropped the trainer's adapter from its slot; do not load others into this engine"
            )
        name, targets = self.name, self._targets
        into_b = [target.b for target in targets]
        halves = [t.layer.lora_A[name].weight for t in targets] + [t.layer.lora_B[name].weight for t in targets]
        with whole(halves) as tensors:
            a, b = tensors[: len(targets)], tensors[len(targets) :]
            torch._foreach_copy_([t.a for t in targets], [t.columns.of(w) for t, w in zip(targets, a, strict=True)])
            torch._foreach_copy_(into_b, [t.rows.of(w) for t, w in zip(targets, b, strict=True)])
        # Scaled in the buffer, as vLLM does when it loads one; read anew, since a script may change it
        torch._foreach_mul_(into_b, [float(t.layer.scaling[name]) for t in targets])

    def _register(self) -> None:
        """Take the slot with an adapter that has no weights, and pin it."""
        manager = self._manager
        # Where another adapter was served: vLLM sets the slot to zero when it is taken anew
        manager.__dict__.pop("_load_adapter", None)
        if _ID in manager.list_adapters():
            manager.remove_adapter(_ID)
        from_disk = manager._load_adapter

        def load(request: Any) -> Any:
            if request.lora_path != _PATH:
                return from_disk(request)
            from vllm.lora.lora_weights import LoRALayerWeights

            # vLLM looks at the first layer of an adapter, so there must be one; no module has this name
            empty = LoRALayerWeights("trl_turbo", 1, 1, torch.zeros(1, 1), torch.zeros(1, 1))
            # Its class has been in three modules; the manager knows it
            make = manager._lora_model_cls
            return make(request.lora_int_id, manager.lora_config.max_lora_rank, {"trl_turbo": empty})

        # On the instance: vLLM reads adapters from a folder and has no way to be given one.
        manager._load_adapter = load
        manager.add_adapter(self.request)
        manager.pin_adapter(_ID)

    def _slot(self) -> int | None:
        ids = self._manager._adapter_manager.lora_index_to_id
        return ids.index(_ID) if _ID in ids else None

    def _find(self, layers: Mapping[str, Any]) -> tuple[_Target, ...]:
        manager, slot = self._manager._adapter_manager, self._slot()
        left = dict(layers)
        found: list[_Target] = []
        for name, module in manager.modules.items():
            parent, _, leaf = name.rpartition(".")
            # vLLM has one module for q, k and v, and one for gate and up, with a buffer for each
            parts = manager.packed_modules_mapping.get(leaf, [leaf])
            for index, part in enumerate(parts):
                layer = left.pop(f"{parent}.{part}", None)
                if layer is not None:
                    found.append(self._target(name, module, (index, len(parts)), slot, layer))
        if left:
            raise EngineDeclinedError(f"vLLM has no adapter buffer for {next(iter(left))} ({len(left)} such)")
        return tuple(found)

    def _target(self, name: str, module: Any, part: tuple[int, int], slot: int | None, layer: Any) -> _Target:
        index, parts = part
        if not isinstance(module.lora_a_stacked, tuple) or index >= len(module.lora_a_stacked):
            raise EngineDeclinedError(f"vLLM keeps the adapter of {name} in another layout")
        rank = int(layer.r[self.name])
        columns, rows = cuts(module, index, parts, layer.in_features, layer.out_features)
        a, b = module.lora_a_stacked[index][slot, 0], module.lora_b_stacked[index][slot, 0]
        if a.shape[0] < rank or a.shape[1] != columns.size or b.shape[0] != rows.size:
            raise EngineDeclinedError(
                f"vLLM's adapter buffers of {name} are {tuple(a.shape)} and {tuple(b.shape)}, and the layer needs "
                f"({rank}, {columns.size}) and ({rows.size}, {rank})"
            )
        return _Target(layer, rank, a, b, columns, rows, _weight(module, index))


def _weight(module: Any, index: int) -> Tensor | None:
    """The rows of a layer's unquantised weight that belong to one of the linears it stands for."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    base = module.base_layer
    weight = getattr(base, "weight", None)
    sizes = [b.shape[2] for b in module.lora_b_stacked]
    if type(base.quant_method) is not UnquantizedLinearMethod or not isinstance(weight, Tensor):
        return None
    if weight.shape != (sum(sizes), module.lora_a_stacked[index].shape[3]):
        return None
    return weight.data.narrow(0, sum(sizes[:index]), sizes[index])
