"""Tiny models whose norms, rotary embedding and MLPs are of the forms that models have, and what ran in them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from .models import _SHAPE, FAMILIES, VOCAB

# What is beside the families of the other tests
_PARTIAL = {"partial_rotary_factor": 0.5, "head_dim": 16, "tie_word_embeddings": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: FAMILIES[name] for name in ("llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "gemma2", "gemma3-text")},
    "phi3": FAMILIES["phi3"],
    "phi4": ("Phi3Config", {**_PARTIAL, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "glm4": ("Glm4Config", {**_PARTIAL, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "cohere": FAMILIES["cohere"],
    "gemma-erf": ("GemmaConfig", {"hidden_activation": "gelu", "hidden_act": "gelu"}),
}
# Norms, rotary embeddings and MLPs that run on our ops: of two layers, and the last norm
RUNS: dict[str, tuple[int, int, int]] = {
    "llama": (5, 2, 2),
    "mistral": (5, 2, 2),
    "qwen2": (5, 2, 2),
    "qwen3": (9, 2, 2),
    # From transformers 5 on all experts have their weights in one tensor; before, each of the 2 * 4 is an MLP
    "qwen3-moe": (9, 2, 0 if int(transformers.__version__.partition(".")[0]) >= 5 else 8),
    "gemma2": (9, 2, 2),
    "gemma3-text": (13, 2, 2),
    "phi3": (5, 2, 2),
    "phi4": (5, 2, 2),
    "glm4": (9, 2, 2),
    "cohere": (0, 2, 2),  # its norms are layer norms
    "gemma-erf": (5, 2, 2),
}
OPS = ("_RmsNormBackward", "_RopeBackward", "_GatedBackward")


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 3, **settings: Any) -> Any:
    """A model with random weights, those of its norms included, the same for every dtype that holds them."""
    kind, own = MODELS[name]
    attention = settings.pop("attn_implementation", "eager")
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**{**_SHAPE, **own, **settings})
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # the default one has no float64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
    return model.to(dtype)


def tokens(seed: int = 4, shape: tuple[int, int] = (4, 24)) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def ran(output: torch.Tensor) -> tuple[int, int, int]:
    """How often each of our ops stands in the graph behind an output."""
    names: Counter[str] = Counter()
    queue, seen = [output.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names[type(node).__name__] += 1
            queue += [there for there, _ in node.next_functions]
    return tuple(names[op] for op in OPS)  # type: ignore[return-value]


def results(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every parameter for random gradients of the logits."""
    logits = model(input_ids=ids).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(logits)
    gradients = torch.autograd.grad(logits, list(model.parameters()), weights, allow_unused=True)
    named = zip(model.named_parameters(), gradients, strict=True)
    return {"logits": logits.detach(), **{name: g for (name, _), g in named if g is not None}}
