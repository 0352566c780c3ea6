"""Stand-ins for what TRL's tests load from a hub, in the cache of one, so that they run without a network.

Models of the names that a test file has get random weights of the architecture in the name, a tokenizer with a token
a byte and the chat template that TRL ships for the family; the dataset of prompts is written here. Models go through
transformers' own loading code. What is not made (images, unknown families) fails stock as it does patched.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = re.compile(r"trl-internal-testing/(tiny-(\w+?)For(CausalLM|SequenceClassification)(?:-[\w.]+)?)(?=[\"'])")
REVISION = "0" * 40
VOCABULARY = 320
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "head_dim": 32,  # the least that vLLM has on a CPU
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
WORDS = ("fast", "slow", "small", "large", "plain", "quiet", "early", "late", "short", "long", "warm", "cold", "open")
TRAIN, TEST = 17, 2


def names(files: list[Path]) -> Iterator[tuple[str, str, str]]:
    """Name, family and head of every model that a file names."""
    yield from sorted({match for path in files for match in NAME.findall(path.read_text(encoding="utf-8"))})


def fill(home: Path, files: list[Path]) -> tuple[list[str], list[str]]:
    """Make every model that a file names.

    Args:
        home: What `HF_HOME` is.
        files: Tests.

    Returns:
        Names that were made, and that were not.
    """
    made, missing = [], []
    for name, family, head in names(files):
        model = _model(family, head)
        if model is None:
            missing.append(name)
            continue
        root = home / "hub" / f"models--trl-internal-testing--{name}"
        folder = root / "snapshots" / REVISION
        model.save_pretrained(folder)
        _tokenizer(family).save_pretrained(folder)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(REVISION)
        made.append(name)
    return made, missing


def _model(family: str, head: str) -> Any:
    import torch
    import transformers

    known = getattr(transformers, f"{family}Config", None)
    if known is None:
        return None
    special = {"pad_token_id": 256, "eos_token_id": 257, "bos_token_id": None, "vocab_size": VOCABULARY}
    # A dense model's configuration would keep what it does not know, and be taken for a mixture of experts
    sizes = {key: value for key, value in SIZES.items() if hasattr(known(), key)}
    torch.manual_seed(0)
    try:
        if head == "CausalLM":
            return transformers.AutoModelForCausalLM.from_config(known(**sizes, **special), dtype=torch.float32)
        config = known(**sizes, **special, num_labels=1)
        return transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except (TypeError, ValueError):
        return None


def _tokenizer(family: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    tokens = [*letters, *specials]
    tokens += [f"<{i}>" for i in range(len(tokens), VOCABULARY)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=specials[0],
        eos_token=specials[1],
        chat_template=_template(family),
        model_input_names=["input_ids", "attention_mask"],
    )


def _template(family: str) -> str:
    """The template that TRL ships for a family, else that of Qwen 2.5; the plainest where it ships none."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    for name in (family.lower(), f"{family.lower()}_5", "qwen2_5", "qwen3"):
        path = folder / f"{name}.jinja"
        if path.exists():
            return path.read_text(encoding="utf-8")
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def rows(config: str, count: int) -> list[dict[str, Any]]:
    """Rows of a configuration of the dataset: prompts alone, or preferences; as text, or as messages."""
    found = []
    for i in range(count):
        first, second, third = (WORDS[(i + step) % len(WORDS)] for step in (0, 5, 9))
        row: dict[str, Any] = {"prompt": f"{first} is better than"}
        if "preference" in config:
            row |= {"chosen": f" {second}.", "rejected": f" {third}, or not."}
        if config.startswith("conversational"):
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            row = {key: [{"role": roles[key], "content": value}] for key, value in row.items()}
        if "implicit" in config:
            prompt = row.pop("prompt")
            row = {key: prompt + value for key, value in row.items()}
        found.append(row)
    return found


def load_dataset(path: str, name: str = "standard_prompt_only", split: str | None = None, **kwargs: Any) -> Any:
    """As `datasets.load_dataset`, for the one dataset that is made here."""
    from datasets import Dataset, DatasetDict

    if path != "trl-internal-testing/zen":
        raise FileNotFoundError(f"{path} is not made here: the stand-in for a hub has trl-internal-testing/zen alone.")
    whole = DatasetDict({"train": Dataset.from_list(rows(name, TRAIN)), "test": Dataset.from_list(rows(name, TEST))})
    return whole if split is None else whole[split]


def pytest_configure(config: Any) -> None:
    """Before tests take it from there, and before TRL makes its configurations of transformers'."""
    import datasets
    import torch
    from transformers import TrainingArguments

    datasets.load_dataset = load_dataset
    if not torch.cuda.is_available():  # where bf16, TRL's default, has to be asked for by this
        TrainingArguments.__dataclass_fields__["use_cpu"].default = True


def main(arguments: list[str]) -> int:
    """Fill a cache: HOME FILE ..."""
    made, missing = fill(Path(arguments[0]), [Path(each) for each in arguments[1:]])
    print("made", *made)
    print("not made", *missing)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
