"""Which LoRA adapters vLLM can serve as they are trained, told from their configuration alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from trl_turbo.engine.names import unwrapped


def active_adapter(model: Any) -> str | None:
    """Name of the adapter that is trained, or `None` where there is none.

    A trainer may hold a frozen second one as its reference; the active one is served.
    """
    names = _active_adapters(model)
    return names[0] if names else None


def _active_adapters(model: Any) -> tuple[str, ...]:
    model = unwrapped(model)
    if not getattr(model, "peft_config", None):
        return ()
    if not hasattr(model, "get_base_model"):
        return _applied(model)
    active = model.active_adapters
    return tuple(map(str, active() if callable(active) else active))


def _applied(model: Any) -> tuple[str, ...]:
    """The adapters that a transformers model with PEFT's layers in it applies now: neither merged nor disabled."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    if layer is None or layer.disable_adapters:
        return ()
    return tuple(str(name) for name in layer.active_adapters if name not in layer.merged_adapters)


def adapter_layers(model: Any, adapter: str) -> dict[str, Any]:
    """PEFT's LoRA layers that have this adapter, by the name of the linear that each wraps.

    Asked at every sync: of the parts of a layer, which are most of a model's modules, only the base is looked into.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, name: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        inside = module._modules
        parts = [inside[kind] for kind in ("lora_A", "lora_embedding_A") if kind in inside]
        if any(adapter in part for part in parts):  # type: ignore[operator]
            found[name.removeprefix("base_model.model.")] = module
        for key, child in (("base_layer", inside.get("base_layer")),) if parts else inside.items():
            if child is not None:
                visit(child, f"{name}.{key}" if name else key)

    visit(unwrapped(model), "")
    return found


def adapter_declined(model: Any) -> str | None:
    """Say why the model's adapter cannot be served, or return `None`."""
    model = unwrapped(model)
    name = active_adapter(model)
    if name is None:
        return None
    several = _active_adapters(model)
    if len(several) > 1:
        return f"{len(several)} adapters are active at once ({', '.join(several)}), and vLLM serves one"
    config = model.peft_config[name]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"the adapter is {kind}, and vLLM serves LoRA"
    return _config_declined(config) or _layers_declined(adapter_layers(model, name), name)


def _config_declined(config: Any) -> str | None:
    if getattr(config, "use_dora", False):
        return "the adapter uses DoRA, which vLLM does not serve"
    if getattr(config, "bias", "none") != "none" or getattr(config, "lora_bias", False):
        return "the adapter trains biases, which vLLM does not serve"
    if getattr(config, "modules_to_save", None):
        return f"modules_to_save={list(config.modules_to_save)} trains whole modules beside the adapter"
    if getattr(config, "trainable_token_indices", None):
        return "the adapter trains single token embeddings, which vLLM does not serve"
    if getattr(config, "target_parameters", None):
        return "the adapter targets parameters instead of modules, which vLLM does not serve"
    return None


def _layers_declined(layers: dict[str, Any], adapter: str) -> str | None:
    if not layers:
        return f"the adapter {adapter!r} has no LoRA layer in the model"
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if isinstance(base, nn.Embedding) or name.split(".")[-1] in ("lm_head", "embed_tokens"):
            return f"the adapter is on {name}, and vLLM keeps adapters of embeddings and heads in another layout"
        if not isinstance(base, nn.Linear):
            return f"the adapter is on {name}, a {type(base).__name__} and no linear"
        if getattr(layer, "lora_variant", {}).get(adapter) is not None:
            return f"the adapter on {name} is a variant of LoRA that vLLM does not serve"
        if layer.lora_B[adapter].bias is not None:
            return "the adapter trains biases, which vLLM does not serve"
        if getattr(layer, "fan_in_fan_out", False):
            return f"the adapter on {name} keeps its matrices transposed"
    return None
