"""What an engine is declined for before anything is built: one sentence each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trl_turbo.engine import four_bit
from trl_turbo.engine.adapter_config import adapter_declined
from trl_turbo.engine.names import base_model, base_weights


@dataclass(frozen=True)
class _Candidate:
    model: Any
    kwargs: dict[str, Any]
    accelerator: Any
    device: torch.device | None

    @property
    def base(self) -> Any:
        return base_model(self.model)

    @property
    def parameters(self) -> list[Any]:
        return [slot.parameter for slot in base_weights(self.model).values()]

    @property
    def devices(self) -> set[torch.device]:
        return {self.device} if self.device is not None else {parameter.device for parameter in self.parameters}


def declined(
    model: Any, llm_kwargs: dict[str, Any], accelerator: Any = None, device: torch.device | None = None
) -> str | None:
    """Say why this model is not served from its own weights, or return `None`.

    Args:
        model: The trainer's model.
        llm_kwargs: What TRL passes to `LLM`.
        accelerator: The trainer's, where there is one.
        device: Where the model's weights will be; `None` for where they are.
    """
    candidate = _Candidate(model, llm_kwargs, accelerator, device)
    for check in _CHECKS:
        reason = check(candidate)
        if reason:
            return reason
    return adapter_declined(model)


def parallelism(model: Any, llm_kwargs: dict[str, Any], accelerator: Any = None) -> str | None:
    """Say which parallelism keeps vLLM from reading this model's tensors in place, or return `None`.

    Args:
        model: The trainer's model.
        llm_kwargs: What TRL passes to `LLM`.
        accelerator: The trainer's, where there is one.
    """
    candidate = _Candidate(model, llm_kwargs, accelerator, None)
    return _parallel(candidate) or _sharded(candidate)


def unservable(model: Any, llm_kwargs: dict[str, Any], accelerator: Any = None) -> str | None:
    """Say why the adapter alone cannot be pushed into a vLLM that has its own base weights, or return `None`.

    Args:
        model: The trainer's model, with an active adapter.
        llm_kwargs: What TRL passes to `LLM`.
        accelerator: The trainer's, where there is one.
    """
    candidate = _Candidate(model, llm_kwargs, accelerator, None)
    for check in (_vision, _encoder, _unproven, _packed, _implementation, _other_parallelism, _trained):
        reason = check(candidate)
        if reason:
            return reason
    return adapter_declined(model)


def _parallel(candidate: _Candidate) -> str | None:
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if (candidate.kwargs.get(name) or 1) > 1:
            return (
                f"{name} is {candidate.kwargs[name]}, and a trainer holds whole tensors, not vLLM's shards (with 1 "
                "they would be shared)"
            )
    return None


def _sharded(candidate: _Candidate) -> str | None:
    state = getattr(candidate.accelerator, "state", None)
    if getattr(state, "fsdp_plugin", None) is not None:
        return "FSDP keeps shards of each tensor, and vLLM reads whole ones"
    plugin = getattr(state, "deepspeed_plugin", None)
    if plugin is not None:
        return f"DeepSpeed ZeRO stage {plugin.zero_stage} replaces the model's tensors by flat buffers of its own"
    for parameter in candidate.model.parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh"):
            return "the model's tensors are shards (ZeRO or DTensor), and vLLM reads whole ones"
    return None


def _vision(candidate: _Candidate) -> str | None:
    config = candidate.base.config
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        return f"{type(candidate.base).__name__} takes images or sound, which sharing has not been proven for"
    return None


def _encoder(candidate: _Candidate) -> str | None:
    return "the model is an encoder-decoder" if getattr(candidate.base.config, "is_encoder_decoder", False) else None


def _experts(candidate: _Candidate) -> str | None:
    config = candidate.base.config.get_text_config()
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if (getattr(config, name, None) or 0) > 1:
            return "vLLM repacks the weights of a mixture of experts for its kernels"
    if getattr(config, "kv_lora_rank", None):
        return (
            "vLLM derives further weights from those of multi-head latent attention, which training would leave behind"
        )
    return None


def _quantised(candidate: _Candidate) -> str | None:
    config = getattr(candidate.base.config, "quantization_config", None)
    if config is None and not getattr(candidate.base, "is_quantized", False):
        method = None
    else:
        method = getattr(config, "quant_method", None) or (config or {}).get("quant_method", "unknown")
        method = getattr(method, "value", method)
    if method not in (None, "bitsandbytes"):
        return f"the model is quantised ({method}), and vLLM would repack its weights"
    if candidate.kwargs.get("quantization") not in (None, method):
        return f"quantization={candidate.kwargs['quantization']!r} makes vLLM keep other weights than the trainer's"
    return four_bit.declined(base_weights(candidate.model), candidate.base.get_output_embeddings())


def _dtype(candidate: _Candidate) -> str | None:
    packed = [four_bit.is_four_bit(parameter) for parameter in candidate.parameters]
    found = {p.dtype for p, four in zip(candidate.parameters, packed, strict=True) if not four}
    names = sorted(str(dtype).removeprefix("torch.") for dtype in found)
    if any(packed) and torch.float32 in found:
        return (
            "the model's weights that are not in 4 bits are in float32, as PEFT's prepare_model_for_kbit_training "
            "leaves them, and vLLM runs 4-bit models in 16 bits; load them in bfloat16 and leave that call out"
        )
    if len(found) > 1:
        return f"the model's weights are {' and '.join(names)}, and vLLM runs in one dtype; load the model in one"
    wanted = str(candidate.kwargs.get("dtype", "auto")).removeprefix("torch.")
    if wanted not in ("auto", names[0]):
        return f"dtype={wanted!r} was asked of vLLM and the trainer's weights are {names[0]}"
    on_gpu = any(device.type == "cuda" for device in candidate.devices)
    if on_gpu and names[0] == "float32":
        return (
            "the trainer holds its weights in float32, and vLLM samples in 16 bits on a GPU; load the model in bfloat16"
        )
    return None


def _devices(candidate: _Candidate) -> str | None:
    devices = candidate.devices
    if len(devices) > 1:
        return f"the model is spread over {len(devices)} devices ({', '.join(sorted(map(str, devices)))})"
    device = next(iter(devices))
    if device.type not in ("cpu", "cuda"):
        return f"the model is on {device}, and vLLM reads weights on a CUDA device or, as a CPU build, on the CPU"
    if device.type == "cpu" and torch.cuda.is_available():
        return "the model is on the CPU while vLLM runs on the GPU; call model.to('cuda') first"
    return None


def _unproven(candidate: _Candidate) -> str | None:
    if _experts(candidate):
        return "mixtures of experts and multi-head latent attention have not been proven in it"
    return None


def _packed(candidate: _Candidate) -> str | None:
    if getattr(candidate.base, "is_quantized", False) or candidate.kwargs.get("quantization"):
        return "the model is quantised, and vLLM would quantise its own base anew, which has not been proven the same"
    return None


def _other_parallelism(candidate: _Candidate) -> str | None:
    for name in ("pipeline_parallel_size", "data_parallel_size"):
        if (candidate.kwargs.get(name) or 1) > 1:
            return f"{name} is {candidate.kwargs[name]}, for which it has not been proven"
    plugin = getattr(getattr(candidate.accelerator, "state", None), "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        return "FSDP 1 keeps adapters in flat buffers; set fsdp_version to 2"
    if any(hasattr(parameter, "device_mesh") for parameter in candidate.model.parameters()):
        return "the model's tensors were DTensors before the engine started, for which it has not been proven"
    return None


def _trained(candidate: _Candidate) -> str | None:
    for slot in base_weights(candidate.model).values():
        if slot.parameter.requires_grad:
            return f"{slot.name} is trained beside the adapter"
    return None


def _implementation(candidate: _Candidate) -> str | None:
    if candidate.kwargs.get("model_impl") in ("transformers", "terratorch"):
        name = candidate.kwargs["model_impl"]
        return f"model_impl={name!r} builds vLLM's model from modules that sharing was not proven for"
    return None


_CHECKS = (_parallel, _sharded, _vision, _encoder, _experts, _quantised, _dtype, _devices, _implementation)
