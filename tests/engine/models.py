"""Tiny models of each family, with random weights, saved where vLLM can read their configuration."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

VOCAB = 211  # no multiple of 64: vLLM pads it
FAMILIES = ("qwen2_tied", "qwen2", "llama", "mistral", "qwen3", "gemma2", "phi3")


def tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<eos>", "<unk>", *string.digits, *string.ascii_letters, *string.punctuation, " ", "\n"]
    tokens += [f"<{i}>" for i in range(len(tokens), VOCAB)]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def make(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
    """A model of this family. Spread-out weights, so that a wrong one changes the answer."""
    import transformers
    from transformers import AutoModelForCausalLM

    name, _, tied = family.partition("_")
    classes = {"qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3", "gemma2": "Gemma2"}
    config_class = getattr(transformers, f"{ {**classes, 'phi3': 'Phi3'}[name] }Config")
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": bool(tied) or name == "gemma2",
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **({"sliding_window": None} if name in ("mistral", "phi3") else {}),
        **config,
    }
    if name in ("qwen2", "phi3"):
        settings["hidden_size"], settings["num_attention_heads"] = config.get("hidden_size", 128), 4
        settings.pop("head_dim")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config_class(**settings), dtype=dtype).eval()


def quantised(folder: Path, family: str = "qwen2_tied", *, skip: list[str] | None = None, **settings: Any) -> Any:
    """A model in 4 bits as `from_pretrained` makes it from one in 16, whose configuration knows nothing of it.

    Args:
        folder: Where the 16-bit model goes.
        family: As for :func:`make`.
        skip: `llm_int8_skip_modules`.
        settings: For `BitsAndBytesConfig`, where they start with `bnb_`; the others as for :func:`make`.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    chosen = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
        **{name: settings.pop(name) for name in list(settings) if name.startswith("bnb_")},
    }
    device = settings.pop("device", "cpu")
    settings = {"dtype": torch.bfloat16, **settings}
    saved(folder, family, **settings)
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip, **chosen)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=settings["dtype"], device_map={"": device}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Or the first forward of a test, on a CPU that has it, would repack the weights before an engine starts
            module.support_avx512bf16_for_cpu = False
    return model


def saved(folder: Path, family: str = "qwen2_tied", **settings: Any) -> tuple[Any, str]:
    """A model as a trainer holds it: `name_or_path` names a folder with its configuration and tokenizer."""
    model = make(family, **settings)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    model.name_or_path = model.config._name_or_path = str(folder)
    return model, str(folder)
