"""A base model and chats: transformers raises where it renders one; the report says what to do about it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.patches.people.warn import warn
from trl_turbo.patching import Replacement

TEXT = (
    "{} has no chat template, as base models have none, and the data are chats: take the instruct model, give the "
    "tokenizer one (trl.clone_chat_template(model, tokenizer, 'Qwen/Qwen3-0.6B')), or make the prompts plain texts"
)


def probe(module: ModuleType) -> str | None:
    """Why the module does not fit, or `None`."""
    if getattr(getattr(module, "PreTrainedTokenizerBase", None), "get_chat_template", None) is None:
        return f"{module.__name__} has no PreTrainedTokenizerBase.get_chat_template"
    return None


def build(module: ModuleType) -> Iterator[Replacement]:
    """The replacements."""
    yield Replacement(module.PreTrainedTokenizerBase, "get_chat_template", _told)


def _told(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_chat_template(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except ValueError:
            if self.chat_template is None:
                warn("chat_template", TEXT.format(f"the tokenizer of {self.name_or_path or 'this model'}"))
            raise

    return get_chat_template
