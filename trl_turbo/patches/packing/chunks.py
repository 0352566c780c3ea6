"""GRPO's and RLOO's passes without gradients in chunks of as many tokens as TRL's have, not of as many rows.

TRL scores old and reference log-probs in chunks of `per_device_train_batch_size` rows. Packed, a chunk holds fewer
tokens than it is allowed, and answers of one prompt are spread over chunks that each have to run it. Here a chunk takes
rows until they come to the tokens of a padded chunk of TRL's, so it is never larger than what stock runs. What is
scored, a token at a time, does not depend on it; the training pass keeps TRL's micro-batches.

Where parameters are sharded TRL's chunks stay: each pass gathers them in all processes, which have other tokens each.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from trl_turbo.compat.signatures import misfit
from trl_turbo.patches.attention.check import drops_out
from trl_turbo.patches.attention.passes import runs_packed
from trl_turbo.patches.attention.stand_in import has_shards
from trl_turbo.patches.logprob.hook import causal_lms
from trl_turbo.patches.logprob.policy import FIRST, method_name
from trl_turbo.patching import Replacement
from trl_turbo.report import note

# What a chunk of rows does not cut: sizes, switches, and an auxiliary loss, which is a mean over TRL's chunks
_ROWLESS = frozenset({"batch_size", "compute_entropy", "compute_aux_loss"})

_IN_STEP = (
    "parameters are sharded, and every process must make as many passes as the others: passes without gradients keep "
    "TRL's chunks of rows"
)


def probe(module: ModuleType, trainer_name: str) -> str | None:
    """Why the module does not fit, or `None`."""
    trainer = getattr(module, trainer_name, None)
    if trainer is None:
        return f"{module.__name__} has no {trainer_name}"
    wanted = (*FIRST, "batch_size")
    return misfit(trainer, {method_name(trainer): wanted})


def build(module: ModuleType, trainer_name: str) -> Iterator[Replacement]:
    """The method that scores, which makes the chunks."""
    trainer = getattr(module, trainer_name)
    yield Replacement(trainer, method_name(trainer), _by_tokens)


def _by_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(
        self: Any, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: Any, *args: Any, **kwargs: Any
    ) -> Any:
        first = (model, input_ids, attention_mask, logits_to_keep)
        asked = signature.bind(self, *first, *args, **kwargs).arguments
        rows, rest = asked.get("batch_size"), {k: v for k, v in asked.items() if k not in FIRST}
        others = any(v is not None for k, v in rest.items() if k not in _ROWLESS) or rest.get("compute_aux_loss")
        if torch.is_grad_enabled() or not rows or rows >= len(input_ids) or others:
            return original(self, *first, *args, **kwargs)
        causal_lm = next(causal_lms(model), None)
        if causal_lm is not None and has_shards(causal_lm):
            note("packing", _IN_STEP)
            return original(self, *first, *args, **kwargs)
        with self.accelerator.autocast():  # as the pass itself will be
            if causal_lm is None or not runs_packed(causal_lm, input_ids.device):
                return original(self, *first, *args, **kwargs)
        ends = chunk_ends(input_ids, attention_mask, logits_to_keep, rows, share=not drops_out(causal_lm))
        parts = []
        for start, end in zip([0, *ends], ends, strict=False):
            cut = {**rest, "batch_size": end - start}
            parts.append(original(self, model, input_ids[start:end], attention_mask[start:end], logits_to_keep, **cut))
        return tuple(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True))

    return method


def chunk_ends(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, rows: int, *, share: bool
) -> list[int]:
    """Where chunks end, each of at most the tokens of `rows` padded rows; one wait for the device.

    Args:
        input_ids: int64 [B, L].
        attention_mask: [B, L].
        logits_to_keep: How many columns the completions have.
        rows: How many rows a chunk of TRL's has.
        share: Whether a prompt that follows itself is there once.
    """
    prompt = input_ids.shape[1] - logits_to_keep
    contents = torch.where(attention_mask != 0, input_ids, -1)[:, :prompt]
    again = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
    if share:
        again[1:] = (contents[1:] == contents[:-1]).all(1)
    lengths = ((attention_mask[:, :prompt] != 0).sum(1), (attention_mask[:, prompt:] != 0).sum(1))
    ends, tokens, budget = [], 0, rows * input_ids.shape[1]
    for row, (same, before, after) in enumerate(zip(*torch.stack((again, *lengths)).tolist(), strict=True)):
        more = after if same else before + after
        if row and tokens + more > budget:
            ends.append(row)
            tokens, more = 0, before + after
        tokens += more
    return [*ends, len(input_ids)]
