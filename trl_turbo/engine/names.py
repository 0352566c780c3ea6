"""The weights of a trainer's model under the names that its checkpoint has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


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
    return model.get_base_model() if hasattr(model, "peft_config") else model


def base_weights(model: Any) -> dict[str, Slot]:
    """The weights of the base model: each once, tied ones under the first name, adapters left out.

    Args:
        model: A transformers model, wrapped by PEFT or not.

    Returns:
        Checkpoint name, such as `model.layers.0.self_attn.q_proj.weight`, to slot.
    """
    found: dict[str, Slot] = {}
    seen: set[int] = set()
    for prefix, module in base_model(model).named_modules():
        if is_adapter(prefix):
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{leaf}".replace(".base_layer", "").lstrip(".")
            found[name] = Slot(name, module, leaf)
    return found


def is_adapter(prefix: str) -> bool:
    """Whether a module with this dotted name belongs to a LoRA adapter."""
    return any(part.startswith("lora_") for part in prefix.split("."))


def address(tensor: Tensor) -> int:
    """Where the first element of a tensor lies; 0 for one without storage."""
    return tensor.data_ptr()
