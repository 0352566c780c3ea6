"""PPO (up to TRL 1.12): policy and reference passes go through the module's `forward`, rollouts through `generate`.

Stock stacks the scores of a rollout, `[B, T, V]`. Here each step's scores are read once, when the token sampled from
them is known, and dropped.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from trl_turbo.compat.signatures import misfit
from trl_turbo.patches.logprob.functions import replacements
from trl_turbo.patches.logprob.hook import hook_models
from trl_turbo.patches.logprob.output import FusedCausalLMOutput
from trl_turbo.patches.logprob.request import Request, left_to_trl, masked_targets, scoring
from trl_turbo.patches.logprob.scored import ScoredLogits
from trl_turbo.patching import Replacement

SIGNATURES = {
    "forward": ("model", "query_responses", "pad_token_id"),
    "generate": ("lm_backbone", "queries", "pad_token_id", "generation_config"),
    "batch_generation": ("model", "queries"),
}


@dataclass
class _Run:
    """A PPO training run: what its passes need and its functions are not told."""

    temperature: float
    context_length: int = 0


_RUN: ContextVar[_Run | None] = ContextVar("trl_turbo_ppo_run", default=None)


def rollout_starts(context_length: int) -> None:
    """Say how long the queries of the rollout that is about to be scored are; nothing happens outside of a run.

    For a patch that samples by itself: it may stand before `batch_generation`'s replacement here or behind it.
    """
    run = _RUN.get()
    if run is not None:
        run.context_length = context_length


def probe(module: ModuleType) -> str | None:
    """Why the module does not fit, or `None`."""
    reason = misfit(module, SIGNATURES)
    if reason is not None:
        return reason
    if not hasattr(getattr(module, "PPOTrainer", None), "train"):
        return f"{module.__name__} has no PPOTrainer.train"
    from transformers import GenerationMixin

    if "custom_generate" not in inspect.signature(GenerationMixin.generate).parameters:
        return "transformers' generate takes no custom_generate, which reads a rollout's scores step by step"
    return None


def build(module: ModuleType) -> Iterator[Replacement]:
    """The run, its two kinds of passes, and what reads the rollout's scores."""
    yield from replacements(module)
    yield Replacement(module.PPOTrainer, "train", _in_run)
    yield Replacement(module, "forward", _scored)
    yield Replacement(module, "generate", _without_stack)
    yield Replacement(module, "batch_generation", _known_log_probs)


def _in_run(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        if left_to_trl(self):
            return original(self, *args, **kwargs)
        hook_models(self.model, self.ref_model)
        token = _RUN.set(_Run(temperature=self.args.temperature + 1e-7))  # as TRL divides
        try:
            return original(self, *args, **kwargs)
        finally:
            _RUN.reset(token)

    return train


def _scored(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(model: Any, query_responses: torch.Tensor, pad_token_id: int) -> Any:
        run = _RUN.get()
        if run is None:
            return original(model, query_responses, pad_token_id)
        hook_models(model)
        # Padding inside the response is scored as well: TRL's entropy metric averages over it
        response = torch.ones_like(query_responses)
        response[:, : run.context_length] = 0
        request = Request(
            targets=masked_targets(query_responses, response),
            temperature=run.temperature,
            # The reference pass runs without gradients and is asked for log-probabilities alone
            outputs=("logps", "entropy", "logsumexp") if torch.is_grad_enabled() else ("logps",),
        )
        with scoring(request):
            result = original(model, query_responses, pad_token_id)
            if isinstance(result, tuple):  # PolicyAndValueWrapper: policy output and values
                return (_stand_in(result[0]), *result[1:])
            return _stand_in(result)

    return forward


def _stand_in(output: Any) -> Any:
    # TRL reads the logits after the scope of the pass has ended
    return SimpleNamespace(logits=output.logits) if isinstance(output, FusedCausalLMOutput) else output


def _without_stack(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate(lm_backbone: Any, queries: torch.Tensor, pad_token_id: int, generation_config: Any) -> Any:
        return original(_StepwiseScores(lm_backbone), queries, pad_token_id, generation_config)

    return generate


def _known_log_probs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def batch_generation(model: Any, queries: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rollout_starts(queries.shape[1])
        # The second is [B, T], by _StepwiseScores
        query_responses, log_probs = original(model, queries, *args, **kwargs)
        if not isinstance(log_probs, torch.Tensor):
            return query_responses, log_probs  # sampled by another patch, which scores by the `forward` above
        stats = {"log_probs": log_probs, "targets": query_responses[:, queries.shape[1] :]}
        return query_responses, ScoredLogits(stats, temperature=1.0, vocab=0)

    return batch_generation


class _StepwiseScores:
    """A language model whose `generate` returns as a step's score the log-probability of the token it drew, `[B]`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def generate(self, **kwargs: Any) -> Any:
        taken: list[torch.Tensor] = []

        def sample(model: Any, input_ids: torch.Tensor, logits_processor: Any, **rest: Any) -> Any:
            recorder = _Recorder(taken)
            processors = type(logits_processor)([*logits_processor, recorder])
            result = model._sample(input_ids, logits_processor=processors, **rest)
            recorder.read(getattr(result, "sequences", result))
            return result

        kwargs["output_scores"] = False
        output = self.model.generate(custom_generate=sample, **kwargs)
        return SimpleNamespace(sequences=output.sequences, scores=tuple(taken))


class _Recorder:
    """A logits processor that comes last: it sees the scores a token is drawn from, and the token one call later."""

    def __init__(self, taken: list[torch.Tensor]) -> None:
        self.taken = taken
        self._scores: torch.Tensor | None = None  # [B, V], of the latest step only

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.read(input_ids)
        self._scores = scores
        return scores

    def read(self, sequences: torch.Tensor) -> None:
        """Take the log-probability of the token that was drawn last."""
        if self._scores is not None:
            drawn = self._scores.gather(-1, sequences[:, -1:]).squeeze(-1)
            self.taken.append(drawn - self._scores.logsumexp(-1))
            self._scores = None
