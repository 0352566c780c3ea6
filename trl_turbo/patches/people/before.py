"""What can be seen to be wrong before the first step. Each check returns the warning, or `None`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from trl_turbo.patches.people.chat_template import TEXT as NO_TEMPLATE

#: What a LoRA adapter takes, as a multiple of the learning rate for all weights.
FOR_LORA = 10
#: How far off is far: too small wastes the run, too large ruins it, and by less people do differ.
TOO_SMALL, TOO_LARGE = 10, 100
#: How many of the longest prompts are tokenised, out of how many that are looked at.
LONGEST, LOOKED_AT = 16, 10_000
_LENGTHS = ("max_completion_length", "max_new_tokens", "response_length")


def chat_template(trainer: Any) -> str | None:
    """Chats, and a tokenizer that has no template for them."""
    tokenizer = _tokenizer(trainer)
    first = _first(trainer.train_dataset)
    if tokenizer is None or first is None or getattr(tokenizer, "chat_template", "") is not None:
        return None
    if not any(_is_chat(first.get(column)) for column in ("prompt", "messages", "chosen", "completion")):
        return None
    return NO_TEMPLATE.format(f"the tokenizer of {getattr(tokenizer, 'name_or_path', '') or 'this model'}")


def learning_rate(trainer: Any) -> str | None:
    """A learning rate for LoRA that is far off what follows from the default of the trainer's configuration."""
    if getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", None) is None:
        return None
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(trainer.args)}
    default, rate = defaults["learning_rate"], trainer.args.learning_rate
    usual = FOR_LORA * default
    if usual / TOO_SMALL < rate < usual * TOO_LARGE:
        return None
    far = "small" if rate < usual else "large"
    return (
        f"learning_rate={rate:g} is {far} for LoRA: TRL's default, {default:g}, is for training all weights, and an "
        f"adapter takes about {FOR_LORA} times that; try {usual:g}"
    )


def context(trainer: Any) -> str | None:
    """Prompts that leave no room for an answer in what the model, or the configuration, takes."""
    limit, name = _limit(trainer)
    if limit is None:
        return None
    argument, room = completion_length(trainer.args)
    longest = _longest_prompt(trainer)
    if longest is None or longest + (room or 1) <= limit:
        return None
    needs = f"the longest prompt has {longest} tokens" + (f", {argument} is {room}" if room else "")
    return (
        f"{needs}, and {name} is {limit}: what does not fit is cut off or computed at positions that the model never "
        f"saw; drop long prompts (dataset.filter), or set {argument or 'max_length'} so that both fit"
    )


#: Name of the guard -> its check.
CHECKS: dict[str, Callable[[Any], str | None]] = {
    "chat_template": chat_template,
    "learning_rate": learning_rate,
    "context": context,
}


def completion_length(args: Any) -> tuple[str, int | None]:
    """Return the name of the argument that bounds completions, and its value; empty where there is none."""
    for name in _LENGTHS:
        if isinstance(getattr(args, name, None), int):
            return name, getattr(args, name)
    return "", None


def _limit(trainer: Any) -> tuple[int | None, str]:
    config = trainer.accelerator.unwrap_model(trainer.model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = {
        "the model's max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "vllm_max_model_length": getattr(trainer.args, "vllm_max_model_length", None),
        # Of DPO, OnlineDPO and SFT: what is longer is cut
        "max_length": getattr(trainer.args, "max_length", None),
    }
    found = [(limit, name) for name, limit in limits.items() if isinstance(limit, int) and limit > 0]
    return min(found, default=(None, ""), key=lambda pair: pair[0] or 0)


def _longest_prompt(trainer: Any) -> int | None:
    """Tokens of the longest prompt, as far as that can be told without going through all data."""
    dataset, tokenizer = trainer.train_dataset, _tokenizer(trainer)
    columns = getattr(dataset, "column_names", None) or ()
    for column in ("prompt_ids", "prompt_input_ids"):
        if column in columns:
            return max(map(len, dataset[column][:LOOKED_AT]), default=None)
    if tokenizer is None or "prompt" not in columns or not hasattr(dataset, "__len__"):
        return None
    prompts = dataset[: min(len(dataset), LOOKED_AT)]["prompt"]
    prompts = sorted(prompts, key=lambda prompt: len(str(prompt)))[-LONGEST:]
    if any(_is_chat(prompt) for prompt in prompts):
        if getattr(tokenizer, "chat_template", None) is None:
            return None
        rendered = (
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
            for prompt in prompts
        )
        return max(len(ids["input_ids"]) for ids in rendered)
    return max((len(tokenizer(prompt)["input_ids"]) for prompt in prompts), default=None)


def _tokenizer(trainer: Any) -> Any:
    processing = trainer.processing_class
    return getattr(processing, "tokenizer", processing)


def _first(dataset: Any) -> dict[str, Any] | None:
    # A stream is left alone: reading it may take from it
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or len(dataset) == 0:
        return None
    found = dataset[0]
    return found if isinstance(found, dict) else None


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]
