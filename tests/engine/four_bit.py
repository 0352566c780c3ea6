"""Log-probs of a model in 4 bits: by transformers, by vLLM, and by a dense float32 model of the same values."""

from __future__ import annotations

import copy
from typing import Any

import torch

from trl_turbo.engine.adapter_config import active_adapter, adapter_layers
from trl_turbo.engine.names import base_model, base_weights

#: vLLM's rounding against that of transformers: both round the same products to bfloat16, so that their mean distances
#: from the same values in float32 differ by chance alone, 0.86 to 1.18 times over 248 tokens; by 10 where stale.
SLACK = 1.4
TEXTS = tuple([(3 + 7 * i + 31 * j * j) % 200 + 5 for j in range(32)] for i in range(8))


def by_transformers(model: Any) -> torch.Tensor:
    """Log-probs of the tokens of :data:`TEXTS` that have one before them, [N]."""
    ids = torch.tensor(TEXTS, device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    model.train(was_training)
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten().cpu()


def by_vllm(llm: Any) -> torch.Tensor:
    """The same by vLLM, with the adapter, [N]."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": list(text)} for text in TEXTS], params, use_tqdm=False)
    return torch.tensor(
        [
            output.prompt_logprobs[i][token].logprob
            for output, text in zip(outputs, TEXTS, strict=True)
            for i, token in enumerate(text)
            if i
        ]
    )


def by_truth(model: Any) -> torch.Tensor:
    """The same by a model that knows neither 4 bits nor adapters, in float32, [N]."""
    return by_transformers(dense(model))


def dense(model: Any) -> Any:
    """What the weights mean: unpacked, with the adapter added, in float32."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(base_model(model).config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    truth = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    name = active_adapter(model)
    layers = adapter_layers(model, name) if name else {}
    with torch.no_grad():
        for key, slot in base_weights(model).items():
            truth.get_parameter(key).copy_(values(slot.parameter))
        for key, layer in layers.items():
            a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
            truth.get_submodule(key).weight.add_(float(layer.scaling[name]) * (b @ a).cpu())
    return truth.eval()


def values(parameter: Any) -> torch.Tensor:
    """A weight in float32, unpacked where it is in 4 bits."""
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(parameter, "quant_state", None)
    return (parameter.detach() if state is None else dequantize_4bit(parameter.data, state)).float().cpu()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean distance of two [N]."""
    return float((one - other).abs().mean())


def with_adapter(model: Any) -> Any:
    """As TRL makes it of a quantised model: in bfloat16."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def assert_as_trained(llm: Any, model: Any) -> None:
    """vLLM is no further from the truth than rounding takes transformers."""
    truth = by_truth(model)
    own, ours = (apart(found, truth) for found in (by_transformers(model), by_vllm(llm)))
    assert ours < SLACK * own, (ours, own)
