"""One copy of the weights: what is shared, and whether it still is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trl_turbo.engine import four_bit
from trl_turbo.engine.destinations import Destination, Shape, trace
from trl_turbo.engine.errors import EngineDeclinedError, WeightsMovedError
from trl_turbo.engine.names import Slot, base_model, slot_groups
from trl_turbo.engine.storage import adopt, part, point


@dataclass(frozen=True)
class _Pair:
    """One weight of the trainer and its place in vLLM."""

    slot: Slot
    owner: nn.Parameter
    offset: int  # elements, from the start of the owner's storage
    shape: Shape
    state: four_bit.SharedState | None

    def in_place(self) -> bool:
        tensor = self.slot.module._parameters[self.slot.leaf]
        # data_ptr alone: this runs before every rollout, some 0.2 us a tensor
        start = self.owner.data_ptr() + self.offset * self.owner.element_size()
        if tensor is None or tensor.data_ptr() != start:
            return False
        return self.state is None or self.state.in_place()


class SharedWeights:
    """The weights that a vLLM model and a trainer's model have in common.

    Args:
        model: The trainer's model; PEFT wrappers are seen through.

    Attributes:
        nbytes: Bytes of the trainer's weights that vLLM reads in place, with the scales of those in 4 bits.
        padding_bytes: Bytes that sharing added: rows that vLLM pads a vocabulary with.
    """

    def __init__(self, model: Any) -> None:
        self._model = base_model(model)
        self._groups = slot_groups(model)
        self._slots = {group[0].name: group[0] for group in self._groups}
        self._pairs: tuple[_Pair, ...] = ()
        self.nbytes = 0
        self.padding_bytes = 0

    def __len__(self) -> int:
        return len(self._slots) if self._pairs else 0

    @property
    def packed(self) -> list[str]:
        """Names of the weights in 4 bits."""
        return [name for name, slot in self._slots.items() if four_bit.is_four_bit(slot.parameter)]

    @property
    def dtype(self) -> torch.dtype:
        """What vLLM computes in and keeps its cache in: 4-bit weights are bytes."""
        return next(s.parameter.dtype for s in self._slots.values() if not four_bit.is_four_bit(s.parameter))

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The shared weights, by checkpoint name."""
        return self._slots

    def attach(self, vllm_model: nn.Module) -> None:
        """Point vLLM's freshly built model at the trainer's weights.

        Raises:
            EngineDeclinedError: The two cannot share every tensor; the trainer's model is unchanged then.
        """
        if self._pairs:
            raise EngineDeclinedError(
                "the weights are shared with one vLLM already and a second one asks for them; load the model a second "
                "time for a second engine"
            )
        shapes = self._shapes()
        destinations = trace(vllm_model, shapes)
        four_bit.keep_layout(self._slots.values())
        states = self._bind(dict(vllm_model.named_parameters()), destinations)
        self._pair(adopt(vllm_model, self._slots, destinations), destinations, shapes, states)

    def fill(self, vllm_model: nn.Module, load: Callable[[], None]) -> None:
        """Let vLLM load its model, and point the trainer's model, which has no values, at what it loaded.

        Args:
            vllm_model: vLLM's freshly built model.
            load: Gives it its values.

        Raises:
            EngineDeclinedError: The two cannot share every tensor; nothing was loaded then.
        """
        shapes = self._shapes()
        destinations = trace(vllm_model, shapes)
        load()
        self._pair(point(vllm_model, self._slots, destinations), destinations, shapes, {})
        # Buffers, such as rotary tables, are the model's own; its parameters are there already
        self._model.to(next(iter(self._slots.values())).parameter.device)

    def _shapes(self) -> dict[str, Shape]:
        return {name: Shape(slot.parameter.shape, slot.parameter.dtype) for name, slot in self._slots.items()}

    def _pair(
        self,
        owners: Mapping[str, nn.Parameter],
        destinations: Mapping[str, Destination],
        shapes: Mapping[str, Shape],
        states: Mapping[str, Any],
    ) -> None:
        # Tied slots are checked each: `load_state_dict(assign=True)` gives each a parameter of its own
        self._pairs = tuple(
            _Pair(slot, owners[into.parameter], into.offset, shapes[group[0].name], states.get(group[0].name))
            for group in self._groups
            for into in (destinations[group[0].name],)
            for slot in group
        )
        weights = sum(_nbytes(slot.parameter) for slot in self._slots.values())
        scales = {tensor.data_ptr(): _nbytes(tensor) for state in states.values() for tensor in state.tensors}
        self.nbytes = weights + sum(scales.values())
        self.padding_bytes = sum(_nbytes(owner.data) for owner in owners.values()) - weights

    def _bind(
        self, parameters: Mapping[str, nn.Parameter], destinations: Mapping[str, Destination]
    ) -> dict[str, four_bit.SharedState]:
        """Let vLLM's packed parameters have the trainer's quantisation states; returns them by checkpoint name."""
        members: dict[str, list[tuple[int, nn.Parameter]]] = {}
        states: dict[str, four_bit.SharedState] = {}
        for name, slot in self._slots.items():
            if four_bit.is_four_bit(slot.parameter):
                into = destinations[name]
                members.setdefault(into.parameter, []).append((into.offset, slot.parameter))
                states[name] = four_bit.SharedState(slot)
        for owner, packed in members.items():
            four_bit.bind(parameters[owner], packed)
        return states

    def verify(self, vllm_model: nn.Module) -> None:
        """Check, once vLLM has finished loading, that its model still has the parameters that were shared.

        Raises:
            EngineDeclinedError: vLLM replaced or repacked one after loading, or a weight of the trainer moved.
        """
        live = {id(p) for p in vllm_model.parameters()}
        for pair in self._pairs:
            if id(pair.owner) not in live:
                raise EngineDeclinedError(
                    f"vLLM replaced the weight {pair.slot.name} after loading, as repacking backends do"
                )
            if not pair.in_place():
                raise EngineDeclinedError(
                    f"vLLM moved the weight {pair.slot.name} after loading, as repacking backends do"
                )

    def check(self) -> int:
        """Make sure that vLLM reads what the trainer trains; cheap enough for every rollout.

        A weight that was put elsewhere (`load_state_dict(assign=True)`, a merge that rebinds) is copied into its place
        and becomes a view of it again; vLLM's graphs hold the address, so it must be that one.

        Returns:
            How many weights had moved.

        Raises:
            WeightsMovedError: One has another shape, dtype or device now.
        """
        moved = [pair for pair in self._pairs if not pair.in_place()]
        for pair in moved:
            self._return(pair)
        return len(moved)

    @torch.no_grad()
    def _return(self, pair: _Pair) -> None:
        parameter = pair.slot.parameter
        wanted = part(pair.owner.data, pair.shape.dims, pair.offset)
        expected = pair.shape
        found = Shape(parameter.shape, parameter.dtype)
        if found != expected or parameter.device != wanted.device:
            raise WeightsMovedError(
                f"{pair.slot.name} became {found} on {parameter.device} and was {expected} on {wanted.device}, so "
                "generation would read an old copy; build the trainer after such changes"
            )
        if pair.state is not None and not pair.state.in_place():
            pair.state.take()
        if parameter.data_ptr() != wanted.data_ptr():
            wanted.copy_(parameter.data)
            parameter.data = wanted


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
