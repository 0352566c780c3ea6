"""Weights in 4 bits as bitsandbytes keeps them in the trainer's model: packed bytes and a `QuantState` beside them.

Both are shared with vLLM, whose products read the same two things. bitsandbytes itself is not imported: what it made
is recognised by the `quant_state` of its `Params4bit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trl_turbo.engine.errors import EngineDeclinedError, WeightsMovedError
from trl_turbo.engine.names import Slot

#: What vLLM multiplies 4-bit weights in, whatever the model's dtype: `BitsAndBytesLinearMethod` casts its input.
FOUR_BIT_DTYPE = torch.bfloat16
#: What a `QuantState` multiplies by, and the one nested in it where the scales are quantised too.
_TENSORS = ("absmax", "code", "offset")
_SETTINGS = ("shape", "dtype", "blocksize", "quant_type", "nested")


def is_four_bit(parameter: nn.Parameter) -> bool:
    """Whether bitsandbytes keeps this weight in 4 bits, packed as [n, 1] bytes."""
    return hasattr(parameter, "quant_state")


def declined(slots: Mapping[str, Slot], head: nn.Module | None) -> str | None:
    """Say why weights of a bitsandbytes model cannot be those of vLLM, or return `None`.

    Args:
        slots: The model's weights, by checkpoint name.
        head: The module that makes logits.
    """
    for name, slot in slots.items():
        if slot.parameter.dtype == torch.int8:
            return (
                "the model is in 8 bits (LLM.int8), for which vLLM keeps a state of its own beside each product; "
                "load it in 4 bits"
            )
        if is_four_bit(slot.parameter):
            reason = _weight_declined(name, slot, head)
            if reason is not None:
                return reason
    return None


def _weight_declined(name: str, slot: Slot, head: nn.Module | None) -> str | None:
    parameter, module = slot.parameter, slot.module
    state = parameter.quant_state  # type: ignore[attr-defined]
    if state is None:
        return f"{name} is not quantised yet; move the model to its device before the trainer is built"
    if not isinstance(module, nn.Linear) or module is head:
        return f"{name} is in 4 bits, and vLLM keeps embeddings and heads in 16; list it in llm_int8_skip_modules"
    if parameter.dtype != torch.uint8:
        stored = str(parameter.dtype).removeprefix("torch.")
        return f"{name} keeps its 4-bit values in {stored}, and vLLM reads bytes; leave bnb_4bit_quant_storage out"
    if getattr(state, "packing_format_for_cpu", False):
        return f"bitsandbytes repacked {name} for this CPU in a forward pass; build the trainer before the first one"
    compute = getattr(module, "compute_dtype", None)
    if module.bias is not None and (compute == torch.float32 or compute not in (None, module.bias.dtype)):
        return (
            f"bitsandbytes makes the bias of {name.removesuffix('.weight')} {str(compute).removeprefix('torch.')}, its "
            "compute dtype, and vLLM runs in one 16-bit dtype; set bnb_4bit_compute_dtype to that of the model"
        )
    return None


def bind(owner: nn.Parameter, members: Iterable[tuple[int, nn.Parameter]]) -> None:
    """Give vLLM's packed parameter the trainer's `QuantState`s, as vLLM's own bitsandbytes loader would.

    Args:
        owner: vLLM's parameter, [n, 1] bytes, which the members fill.
        members: First byte in it and the trainer's parameter, for each.

    Raises:
        EngineDeclinedError: The members do not follow each other to the end, or are not all in 4 bits.
    """
    ordered = sorted(members, key=lambda member: member[0])
    starts = [offset for offset, _ in ordered]
    ends = [offset + parameter.numel() for offset, parameter in ordered]
    if starts != [0, *ends[:-1]] or ends[-1] != owner.numel() or not all(is_four_bit(p) for _, p in ordered):
        raise EngineDeclinedError(f"vLLM keeps 4-bit weights in another layout: bytes {starts} of {owner.numel()}")
    # What `BitsAndBytesModelLoader._bind_quant_states_to_params` sets, save that nested scales stay as they are:
    # bitsandbytes multiplies with them directly, and unfolding them would make a second copy in float32.
    owner.bnb_quant_state = dict(enumerate(p.quant_state for _, p in ordered))  # type: ignore[attr-defined]
    owner.bnb_shard_offsets = torch.tensor([0, *ends], device="cpu")  # type: ignore[attr-defined]


class SharedState:
    """The `QuantState` of one weight, which trainer and vLLM hold both.

    vLLM's graphs hold the addresses of its tensors, so these must stay where they are, whatever becomes of the object.

    Args:
        slot: Where the trainer keeps the weight.
    """

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._state: Any = slot.parameter.quant_state  # type: ignore[attr-defined]
        self._inner: Any = self._state.state2 if self._state.nested else None
        self._tensors = tuple(_tensors(self._state))

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Scales and codes, nested ones included."""
        return (tensor for _, _, tensor in self._tensors)

    def in_place(self) -> bool:
        """Whether the trainer's weight still has this state with these tensors."""
        held = getattr(self._slot.module._parameters[self._slot.leaf], "quant_state", None)
        return held is self._state and all(getattr(holder, name) is tensor for holder, name, tensor in self._tensors)

    def take(self) -> None:
        """Copy the state that the trainer's weight has now into this one, and let the weight have this one again.

        Raises:
            WeightsMovedError: It is of another kind.
        """
        parameter, module = self._slot.parameter, self._slot.module
        # `load_state_dict(assign=True)` leaves a plain parameter, for which bitsandbytes looks at the module as well
        found: Any = getattr(parameter, "quant_state", None) or getattr(module, "quant_state", None)
        new = tuple(_tensors(found)) if found is not None else ()
        if not self._fits(found, [tensor for _, _, tensor in new]):
            raise WeightsMovedError(
                f"{self._slot.name} was quantised in another way since the engine started, so generation would read an "
                "old copy; build the trainer after such changes"
            )
        for (holder, name, kept), (_, _, value) in zip(self._tensors, new, strict=True):
            kept.copy_(value)
            setattr(holder, name, kept)
        if self._inner is not None:
            self._state.state2 = self._inner
        parameter.quant_state = module.quant_state = self._state  # type: ignore[attr-defined]

    def _fits(self, found: Any, new: list[Tensor]) -> bool:
        own = list(self.tensors)
        return (
            len(new) == len(own)
            and all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(own, new, strict=True))
            and all(getattr(found, name) == getattr(self._state, name) for name in _SETTINGS)
        )


def keep_layout(slots: Iterable[Slot]) -> None:
    """Keep bitsandbytes from repacking shared weights on a CPU with AVX-512 for bf16, where it trades them for others.

    Answers `bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu`, read in each forward pass; a GPU never repacks.
    """
    for slot in slots:
        if is_four_bit(slot.parameter) and slot.parameter.device.type == "cpu":
            slot.module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _tensors(state: Any) -> Iterator[tuple[Any, str, Tensor]]:
    for holder in (state, state.state2) if state.nested else (state,):
        for name in _TENSORS:
            tensor = getattr(holder, name, None)
            if isinstance(tensor, Tensor):
                yield holder, name, tensor
