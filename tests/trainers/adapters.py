"""PEFT adapters of many kinds; all start with random weights, so that they matter from the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .models import load


def lora(*targets: str, **settings: Any) -> Callable[[], Any]:
    """Makes a LoRA configuration, on the attention unless told."""

    def make() -> Any:
        from peft import LoraConfig

        modules = list(targets or ("q_proj", "v_proj"))
        return LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": modules, "init_lora_weights": False, **settings},
            task_type="CAUSAL_LM",
        )

    return make


def adapted(config: Callable[[], Any]) -> Callable[[str], Any]:
    """Makes a model that carries an adapter already: TRL then keeps a copy of it, named "ref", as the reference."""

    def make(path: str) -> Any:
        from peft import get_peft_model

        return get_peft_model(load(path), config())

    return make
