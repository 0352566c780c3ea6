"""Models of real shapes with random weights, and a tokenizer over their whole vocabulary: no hub is asked.

python -m benchmarks.models qwen2.5-1.5b /tmp/model
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

_QWEN25: dict[str, Any] = {"vocab_size": 151_936, "num_key_value_heads": 2, "tie_word_embeddings": True}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "Qwen2Config",
        _QWEN25
        | {
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    ),
    "qwen2.5-1.5b": (
        "Qwen2Config",
        _QWEN25 | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    ),
    "llama3.1-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-8b": (
        "Qwen3Config",
        {
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": False,
        },
    ),
    "phi-4": (
        "Phi3Config",
        {
            "vocab_size": 100_352,
            "hidden_size": 5120,
            "intermediate_size": 17_920,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 10,
            "original_max_position_embeddings": 32_768,
            "tie_word_embeddings": False,
        },
    ),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config(shape: str) -> Any:
    """The transformers configuration of a shape.

    Raises:
        ValueError: There is no such shape.
    """
    import transformers

    if shape not in SHAPES:
        raise ValueError(f"There is no shape {shape!r}; name one of {', '.join(SHAPES)}.")
    kind, sizes = SHAPES[shape]
    common = {"max_position_embeddings": 32_768, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return getattr(transformers, kind)(**common, **sizes)


def tokenizer(size: int) -> Any:
    """Byte-level BPE: bytes, then pairs of bytes, then a pair and a byte, until `size` is reached."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters]
    longer = [(a + b, c) for c in letters[:3] for a, b in pairs]
    merges = (pairs + longer)[: size - len(special) - len(letters)]
    tokens = [*special, *letters, *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def save(shape: str, folder: Path) -> Path:
    """Write a model of this shape in bfloat16, and its tokenizer, unless they are there."""
    from transformers import AutoModelForCausalLM

    if (folder / "done").exists():
        return folder
    settings = config(shape)
    tokenizer(settings.vocab_size).save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "done").touch()
    return folder


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]))
