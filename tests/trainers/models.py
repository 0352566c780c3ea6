"""Small random models of many families, saved so that trainers load them the real way."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_turbo.demo.tiny import make_tokenizer

#: Whether trainings here run on packed rows and our attention, as by default: with one TRL of the three, so that all
#: that is compared with stock is so both ways. `TRL_TURBO_TEST_PACKED=1` or `0` says it for any.
PACKED = os.environ.get("TRL_TURBO_TEST_PACKED", "01"[version("trl").startswith("1.12.")]) == "1"
#: Keywords of `patch()` that leave the log-prob alone on, for what must be stock's to the bit
ALONE = dict.fromkeys(
    ("shared_pass", "lora", "norms", "rope", "mlp", "attention", "packing", "checkpointing", "memory"), False
)


def turn_off(monkeypatch: Any) -> None:
    """Leave nothing on that is on by default, unless a keyword of `patch()` asks for it."""
    for feature in ("logprob", *ALONE):
        monkeypatch.setenv(f"TRL_TURBO_{feature.upper()}", "0")


VOCAB = 211  # a prime, so that no other dimension of a run is taken for it
VARIANTS = ("plain", "perturbed-1", "perturbed-2")
#: Where those two leave it open; see `rule`.
MORE_VARIANTS = ("perturbed-3", "perturbed-4", "perturbed-5", "perturbed-6")

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # spread-out logits: a flat distribution would hide errors of temperature and scale
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
# Name -> configuration class, settings of its own
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2Config", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"tie_word_embeddings": False, "sliding_window": 16}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
    "gemma3-text": ("Gemma3TextConfig", {"query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {"tie_word_embeddings": False}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0}),
    "qwen3-moe": ("Qwen3MoeConfig", {"tie_word_embeddings": False, **_MOE}),
}


@lru_cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="trl_turbo_tests_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@lru_cache
def folder(family: str = "qwen2", variant: str = "plain", unit: float = torch.finfo(torch.float32).eps) -> str:
    """A saved model with its tokenizer. In a perturbed variant each weight is moved by a random +-`unit` of itself."""
    path = _root() / f"{family}-{variant}-{unit:.0e}"
    name, settings = FAMILIES[family]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**{**_SHAPE, **settings}), dtype=torch.float32, attn_implementation="eager"
    )
    if variant != "plain":
        generator = torch.Generator().manual_seed(int(variant.removeprefix("perturbed-")))
        with torch.no_grad():
            for parameter in model.parameters():
                sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(1 + sign * unit)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def tokenizer() -> Any:
    return make_tokenizer(VOCAB)


def load(path: str, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs)


def load_tokenizer(path: str) -> Any:
    return AutoTokenizer.from_pretrained(path)


def scratch(name: str) -> str:
    """A folder for what a trainer writes."""
    return tempfile.mkdtemp(prefix=name, dir=_root())
