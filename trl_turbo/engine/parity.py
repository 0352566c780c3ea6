"""The check at start-up: vLLM and the trainer's model must give one sampled answer the same log-probs.

A loader that copies a weight and then edits it in place would escape the trace of `destinations`; a model whose
implementation in vLLM differs from that of transformers would train on samples of another policy. Both show here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

#: Mean difference of a token's log-prob that rounding explains. Seen on one H200 in bf16: 0.011 right, 0.9 with a LoRA
#: adapter left out. In fp32, whose only user is a CPU: 0.002, since vLLM's attention there takes a fast exponential.
TOLERANCE = {torch.float32: 0.02, torch.float16: 0.05, torch.bfloat16: 0.1}
PROMPT_TOKENS = 16
SAMPLED_TOKENS = 16


@dataclass(frozen=True)
class Gap:
    """Differences between the log-probs of the sampled tokens."""

    mean: float
    largest: float
    tolerance: float

    @property
    def reason(self) -> str | None:
        """Why the engine must not be used, or `None`."""
        if self.mean <= self.tolerance:  # false for NaN too
            return None
        return (
            f"vLLM's log-probs of one sampled answer differ from the model's own by {self.mean:.3g} a token on average "
            f"({self.largest:.3g} at most), where rounding explains {self.tolerance:g}"
        )


def probe_prompt(vocab_size: int) -> list[int]:
    """Token ids spread over the vocabulary, none of them its first few, which are often special."""
    low = min(8, vocab_size - 1)
    return [low + (i * 7919) % (vocab_size - low) for i in range(PROMPT_TOKENS)]


@torch.no_grad()
def gap(
    model: Any,
    prompt: list[int],
    completion: list[int],
    logprobs: list[float],
    computed_in: torch.dtype | None = None,
) -> Gap:
    """Compare the log-probs that vLLM sampled with to those of the trainer's model.

    Args:
        model: The trainer's model, with its adapter where it has one.
        prompt: Token ids, [P].
        completion: Token ids that vLLM sampled at temperature 1, [T].
        logprobs: Their log-probs from vLLM, [T].
        computed_in: What vLLM multiplies in, where that is not the dtype of the model's logits.
    """
    parameter = next(model.parameters())
    ids = torch.tensor([prompt + completion], device=parameter.device)
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]  # [T, V]
    finally:
        model.train(was_training)
    own = logits.float().log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
    difference = (own - torch.tensor(logprobs, device=own.device)).abs()
    return Gap(float(difference.mean()), float(difference.max()), TOLERANCE.get(computed_in or logits.dtype, 0.1))
