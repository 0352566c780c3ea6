"""The check at start-up: vLLM and the trainer's model must give one sampled answer the same log-probs.

A loader that copies a weight and then edits it in place would escape the trace of `destinations`; a model whose
implementation in vLLM differs from that of transformers would train on samples of another policy. Both show here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

#: Mean difference of a token's log-prob that rounding explains in any model. Seen on one H200 in bf16: 0.011 right, 0.9
#: with a LoRA adapter left out. In fp32, whose only user is a CPU: 0.002, since vLLM's attention there takes a fast
#: exponential.
TOLERANCE = {torch.float32: 0.02, torch.float16: 0.05, torch.bfloat16: 0.1}
#: Rounding grows with the size of the logits and with depth (seen in bf16 on one H200 with random weights: 0.017 at
#: 1.5B, 0.05 at 8B and, in 4 bits, 0.11). Where it exceeds the above, it may be so many times what the model's own
#: log-probs move by when each module's output is off by as much as rounding it may be: two implementations round in
#: other places, and in more of them than there are modules. (In bf16 on a CPU, 4 to 24 layers: from a model in float32
#: to itself in bf16 it is 0.4 to 0.5 of that, and from sdpa's attention to the eager one 0.4 to 0.6.)
MOVED = 4
#: No rounding explains more; an adapter left out comes to 0.9.
LARGEST = 0.5
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
            f"({self.largest:.3g} at most), where rounding explains {self.tolerance:.3g}"
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
    *,
    in_step: bool = False,
) -> Gap:
    """Compare the log-probs that vLLM sampled with to those of the trainer's model.

    Args:
        model: The trainer's model, with its adapter where it has one.
        prompt: Token ids, [P].
        completion: Token ids that vLLM sampled at temperature 1, [T].
        logprobs: Their log-probs from vLLM, [T].
        computed_in: What vLLM multiplies in, where that is not the dtype of the model's logits.
        in_step: Whether other ranks do the same and the model's forward waits for theirs, as where it is sharded: it is
            called as often whatever is found.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([prompt + completion], device=device)
    given = torch.tensor(logprobs, device=device)
    own, dtype = _logprobs(model, ids, len(completion))
    difference = (own - given).abs()
    mean, tolerance = float(difference.mean()), TOLERANCE.get(computed_in or dtype, 0.1)
    if in_step or mean > tolerance:
        tolerance = max(tolerance, explained(model, ids, len(completion)))
    return Gap(mean, float(difference.max()), tolerance)


@torch.no_grad()
def explained(model: Any, ids: torch.Tensor, count: int) -> float:
    """What rounding explains of the mean difference of a token's log-prob in this model.

    Args:
        model: In a 16-bit dtype; in another it is 0.
        ids: [1, T].
        count: How many tokens at the end to ask.
    """
    own, _ = _logprobs(model, ids, count)
    with _moved(model):
        moved, _ = _logprobs(model, ids, count)
    return min(LARGEST, MOVED * float((moved - own).abs().mean()))


def _logprobs(model: Any, ids: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.dtype]:
    """Log-probs of the last `count` of ids [1, T], and the dtype of the logits."""
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0, -count - 1 : -1]  # [count, V]
    finally:
        model.train(was_training)
    return logits.float().log_softmax(-1).gather(-1, ids[0, -count:, None]).squeeze(-1), logits.dtype


@contextmanager
def _moved(model: Any) -> Iterator[None]:
    """While open, each module's output of a 16-bit dtype is off by up to half a unit in the last place, at random.

    Not those of PEFT's layers and in them: with hooks they would run another way than in training.
    """
    numbers: dict[torch.device, torch.Generator] = {}

    def move(module: Any, given: Any, output: Any) -> Any:  # noqa: ARG001
        x = output[0] if isinstance(output, tuple) else output
        if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float16, torch.bfloat16):
            return output
        generator = numbers.setdefault(x.device, torch.Generator(x.device).manual_seed(0))
        off = torch.rand(x.shape, generator=generator, device=x.device).sub_(0.5)
        x = (x.float() * (1 + torch.finfo(x.dtype).eps * off)).to(x.dtype)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    layers = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    hooks = [
        module.register_forward_hook(move)
        for name, module in model.named_modules()
        if layers.isdisjoint({name, *_above(name)})
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _above(name: str) -> Iterator[str]:
    """Names of the modules that a module is in, but the model itself."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
