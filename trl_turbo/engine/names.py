"""The weights of a trainer's model under the names that its checkpoint has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Slot:
    """Where a module keeps one weight.

    The module and the leaf are kept, not the parameter: `load_state_dict(assign=True)` and the like put another
    parameter there, which must be noticed.
    """

    name: str
    module: nn.Module
    leaf: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that stands there now."""
        found = self.module._parameters[self.leaf]
        if found is None:
            raise AttributeError(f"{self.name} was removed from the model; build the trainer anew")
        return found


def unwrapped(model: Any) -> Any:
    """The model inside `torch.compile`'s wrapper and DDP's."""
    while True:
        inner = getattr(model, "_modules", {}).get("_orig_mod") or getattr(model, "_modules", {}).get("module")
        if inner is None:
            return model
        model = inner


def base_model(model: Any) -> Any:
    """The transformers model itself, with PEFT's layers in it where there is an adapter."""
    model = unwrapped(model)
    # Not told by `peft_config`: PEFT leaves that on the transformers model too
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_weights(model: Any) -> dict[str, Slot]:
    """The weights of the base model: each once, tied ones under the first name, adapters left out.

    Args:
        model: A transformers model, wrapped by PEFT or not.

    Returns:
        Checkpoint name, such as `model.layers.0.self_attn.q_proj.weight`, to slot.
    """
    return {slots[0].name: slots[0] for slots in slot_groups(model)}


def slot_groups(model: Any) -> list[list[Slot]]:
    """All slots of the base model, those that hold one parameter together: most groups are of one, tied ones of two."""
    groups: dict[int, list[Slot]] = {}
    for prefix, module in base_model(model).named_modules():
        if is_adapter(prefix):
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{leaf}".replace(".base_layer", "").lstrip(".")
                groups.setdefault(id(parameter), []).append(Slot(name, module, leaf))
    return list(groups.values())


def is_adapter(prefix: str) -> bool:
    """Whether a module with this dotted name belongs to a LoRA adapter."""
    return any(part.startswith("lora_") for part in prefix.split("."))
