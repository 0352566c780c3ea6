"""Teach a small model what a sum looks like, and no more: GRPO is to do the rest."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

IGNORED = -100


def encode(
    sums: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`12+7=19<eos>` for each pair, padded on the right.

    Args:
        sums: N pairs of numbers to add.
        tokenizer: One token a character.

    Returns:
        input_ids, attention_mask and labels, [N, T] int64 each; the labels leave out prompt and padding.
    """
    import torch

    rows = []
    for a, b in sums:
        prompt = tokenizer(f"{a}+{b}=")["input_ids"]
        answer = [*tokenizer(str(a + b))["input_ids"], tokenizer.eos_token_id]
        rows.append((prompt, answer))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        input_ids[i, :end] = torch.tensor([*prompt, *answer])
        attention_mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return input_ids, attention_mask, labels


def teach_format(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    largest: int = 19,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    stop_loss: float = 0.5,
    max_steps: int = 600,
    seed: int = 0,
    console: Console | None = None,
) -> tuple[int, float]:
    """Train on random sums in place, until the model writes numbers of the right kind but often the wrong one.

    It stops at a loss and not at a step: seeds differ in how fast they learn, and GRPO should start at the same place.

    Returns:
        The steps it took and the loss it reached, a running mean in nats a token.
    """
    import torch
    from rich.progress import track

    chance = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model.train()
    running, step = float("inf"), 0
    for step in track(range(1, max_steps + 1), "supervised steps", console=console, transient=True):
        sums = [(chance.randint(0, largest), chance.randint(0, largest)) for _ in range(batch_size)]
        input_ids, attention_mask, labels = encode(sums, tokenizer)
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        running = loss.item() if step == 1 else 0.9 * running + 0.1 * loss.item()
        if running < stop_loss:
            break
    return step, running
