"""Make a small causal LM and its tokenizer on the spot, so that nothing is fetched from a hub."""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
SMALLEST_VOCABULARY = 3 + len(CHARACTERS)
# One line a message; an end-of-text after each, so that the model can learn to stop.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def make_tokenizer(vocab_size: int = SMALLEST_VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character, filled up to `vocab_size` with tokens that no text contains.

    Raises:
        ValueError: `vocab_size` has no room for the printable characters.
    """
    # Imported here: `trl-turbo --help` should not wait for transformers.
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size has no room for the printable characters: it is {vocab_size}; "
            f"pass {SMALLEST_VOCABULARY} or more."
        )
    tokens = [PAD, EOS, UNKNOWN, *CHARACTERS]
    # Every id decodes to something, as in a real vocabulary: sampling from an untrained model draws them all.
    tokens += [f"<{i}>" for i in range(len(tokens), vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        # Without this transformers 4 makes token types as well, which `generate` refuses
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 128, num_layers: int = 2, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """A Qwen2 with random weights in fp32, as wide as the tokenizer's vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": max(2, hidden_size // 32),
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(Qwen2Config(**settings), dtype=torch.float32)


def tiny_folder() -> str:
    """Make a small model with its tokenizer in a new folder, and return its name, which scripts take for a model."""
    import tempfile

    tokenizer = make_tokenizer()
    return str(save(Path(tempfile.mkdtemp(prefix="tiny-qwen2-")), make_model(tokenizer, hidden_size=64), tokenizer))


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write both into `folder`, which a script can then name as its model."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
