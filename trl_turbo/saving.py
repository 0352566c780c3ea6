"""`save_lora`, `load_lora` and `save_pretrained_merged`: what a training ends with."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any


def save_lora(model: Any, folder: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Save a model's LoRA adapter alone, as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        model: A PEFT model.
        folder: Where to.
        tokenizer: Saved beside it where given.

    Raises:
        TypeError: The model has no adapter.
    """
    _adapter_of(model, "save_lora")
    model.save_pretrained(os.fspath(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(os.fspath(folder))


def load_lora(model: Any, folder: str | os.PathLike[str]) -> Any:
    """Put a saved LoRA adapter into a model, to train or to sample on; `fast_generate` uses it from then on.

    Args:
        model: A transformers model, which gets the adapter, or a PEFT model, whose active adapter gets the values. Its
            tensors stay where they are, so that an optimizer and an engine over them see the new values.
        folder: A folder that `save_lora`, or PEFT, wrote.

    Returns:
        The PEFT model: the one that was given where it was one.

    Raises:
        ValueError: The active adapter has other layers or another rank than the saved one.
    """
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    folder = os.fspath(folder)
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    from peft import get_peft_model_state_dict

    name = model.active_adapter
    found = load_peft_weights(folder, device="cpu")
    own = get_peft_model_state_dict(model, adapter_name=name)
    if found.keys() != own.keys() or any(found[key].shape != own[key].shape for key in own):
        odd = sorted(key for key in found.keys() | own.keys() if not _same_shape(found.get(key), own.get(key)))
        raise ValueError(
            f"the adapter in {folder} does not fit the model's active one: {len(odd)} tensors differ, {odd[0]} is one; "
            "pass the model without an adapter, or one with the same rank and target modules"
        )
    set_peft_model_state_dict(model, found, adapter_name=name)
    return model


def save_pretrained_merged(
    model: Any, folder: str | os.PathLike[str], tokenizer: Any = None, *, dtype: Any = None
) -> None:
    """Save a model with its LoRA adapter merged into the weights, for whatever loads a plain model.

    The model itself is left as it is: each layer is merged in a copy of its own, by PEFT's own code, so that no second
    model is ever in memory on the device; the merged weights are collected on the CPU. Weights in 4 or 8 bits are
    dequantised first, so that what is saved is the model in 16 bits that `merge_and_unload` makes of a dequantised one.

    Args:
        model: A PEFT model with a LoRA adapter, or a model without one.
        folder: Where to.
        tokenizer: Saved beside it where given.
        dtype: Of the saved weights; `None` is that of the model, and for a quantised one that in which it computes.

    Raises:
        ValueError: The adapter is not LoRA, so that nothing says what merging would be.
    """
    import torch

    with torch.no_grad():
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        state = dict(_merged(base))
    config = copy.deepcopy(base.config)
    # The second is how transformers 4 remembers what the weights were; as a dtype it cannot be written
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if getattr(config, name, None) is not None:
            delattr(config, name)
    ties = getattr(config, "tie_word_embeddings", False)
    if ties and not _still_tied(base, state):
        # An adapter on one of the two made them two
        config.tie_word_embeddings = ties = False
    wanted = dtype or _dtype_of(base, state)
    config.dtype = wanted
    with torch.device("meta"):
        plain = type(base)(config)
    state = {name: value.to(wanted) if value.is_floating_point() else value for name, value in state.items()}
    missing, unexpected = plain.load_state_dict(state, assign=True, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"merging left {len(missing)} weights of {type(base).__name__} without a value and {len(unexpected)} over, "
            f"such as {[*missing, *unexpected][0]}; merge_and_unload() and save_pretrained() may know this model better"
        )
    if ties:
        plain.tie_weights()
    if getattr(base, "generation_config", None) is not None:
        plain.generation_config = base.generation_config
    plain.save_pretrained(os.fspath(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(os.fspath(folder))


def _merged(base: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of the state dict that the merged model has, on the CPU."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    done: list[str] = []
    for name, module in base.named_modules():
        if any(name.startswith(f"{outer}.") for outer in done):
            continue
        if isinstance(module, BaseTunerLayer):
            layer = _merged_layer(module)
        elif isinstance(module, ModulesToSaveWrapper):
            layer = module.modules_to_save[module.active_adapters[0]]
        elif _quantised(module):
            layer = _dequantised(module)
        else:
            continue
        done.append(name)
        for key, value in layer.state_dict().items():
            yield f"{name}.{key}", value.detach().cpu()
    for key, value in base.state_dict().items():
        if not any(key.startswith(f"{outer}.") for outer in done):
            yield key, value.detach().cpu()


def _merged_layer(layer: Any) -> Any:
    """The base layer of a LoRA layer with the active adapters merged into a copy of its weight."""
    from peft.tuners.lora import Linear, LoraLayer

    if not isinstance(layer, LoraLayer):
        raise ValueError(f"{type(layer).__name__} is no LoRA layer; save_pretrained_merged merges LoRA adapters")
    base = layer.get_base_layer()
    plain = _dequantised(base) if _quantised(base) else copy.deepcopy(base)
    if layer.merged:  # folded in at the moment: what stands there is the merged weight
        return plain
    # PEFT's own code on a twin that shares the adapter and has a base of its own
    kind = Linear if _quantised(base) else type(layer)
    twin = object.__new__(kind)
    vars(twin).update(vars(layer))
    twin._modules = {**layer._modules, "base_layer": plain}
    twin.merged_adapters = []
    for name in ("_caches", "kwargs"):
        if name in vars(layer):
            setattr(twin, name, dict(vars(layer)[name]))
    twin.fan_in_fan_out = getattr(layer, "fan_in_fan_out", False)
    twin.merge()
    return plain


def _quantised(module: Any) -> bool:
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") and hasattr(module, "in_features")


def _dequantised(module: Any) -> Any:
    import torch
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(module)
    plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    if module.bias is not None:
        plain.bias = torch.nn.Parameter(module.bias.detach().to(weight.dtype), requires_grad=False)
    return plain


def _still_tied(base: Any, state: dict[str, Any]) -> bool:
    import torch

    heads = [base.get_input_embeddings(), base.get_output_embeddings()]
    names = {id(module): name for name, module in base.named_modules()}
    inputs, outputs = (state.get(f"{names.get(id(head))}.weight") for head in heads)
    return inputs is not None and outputs is not None and torch.equal(inputs, outputs)


def _dtype_of(base: Any, state: dict[str, Any]) -> Any:
    dtypes = [value.dtype for name, value in state.items() if name.endswith("proj.weight")]
    return dtypes[0] if dtypes and any(map(_quantised, base.modules())) else base.dtype


def _adapter_of(model: Any, function: str) -> None:
    if not hasattr(model, "peft_config"):
        raise TypeError(
            f"{type(model).__name__} has no adapter to save; {function} takes a PEFT model, such as trainer.model "
            "after a training with peft_config"
        )


def _same_shape(one: Any, other: Any) -> bool:
    return one is not None and other is not None and one.shape == other.shape
