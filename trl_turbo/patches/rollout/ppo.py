"""PPO (up to TRL 1.12), which never had vLLM: rollouts and shown samples from a shared engine on the policy.

TRL takes the old log-probabilities from the scores that a token was drawn from. vLLM could give its own, but PPO
compares them with two things that the trainer computes: the reference's (the KL penalty) and, on the same weights, the
policy's (the ratio, which must start at 1: clipping is around 1, and PPO corrects nothing for samples of another
engine). So they come from the trainer's own policy, over the sampled ids and at the same temperature, by the pass that
scores everything else: by the fused log-prob where that is on, and from logits, a chunk at a time, where it is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from trl_turbo.compat.signatures import misfit
from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.engine.together import agreed
from trl_turbo.patches.logprob.ppo import rollout_starts
from trl_turbo.patches.rollout import sampler
from trl_turbo.patching import Replacement

SIGNATURES = {
    "forward": ("model", "query_responses", "pad_token_id"),
    "batch_generation": (
        "model",
        "queries",
        "local_rollout_forward_batch_size",
        "pad_token_id",
        "generation_config",
    ),
}
METHODS = {"train": ("self",), "generate_completions": ("self", "sampling")}

_ROUTED = (
    "samples from a vLLM that shares its weights, where TRL's PPO knows transformers alone; patch(rollout='script') "
    "leaves it to those"
)
#: What of a model's generation configuration TRL's own overrides, or does not change what is sampled.
_HARMLESS = {
    *("temperature", "top_k", "top_p", "do_sample", "max_length", "max_new_tokens"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "transformers_version"),
}
_REPORTING = ("_", "output_", "return_dict")
_NEUTRAL = {"repetition_penalty": 1.0, "typical_p": 1.0, "num_beams": 1, "min_p": 0.0, "min_length": 0}

_GENERATION: ContextVar[Any] = ContextVar("trl_turbo_ppo_generation", default=None)


def probe(module: ModuleType) -> str | None:
    """Why the module does not fit, or `None`."""
    owner = getattr(module, "PPOTrainer", None)
    if owner is None:
        return f"{module.__name__} has no PPOTrainer"
    return misfit(module, SIGNATURES) or misfit(owner, METHODS)


def build(module: ModuleType) -> Iterator[Replacement]:
    """The replacements: the engine, who uses it, and what samples."""
    yield Replacement(module.PPOTrainer, "__init__", functools.partial(_init, module.PPOTrainer))
    yield Replacement(module.PPOTrainer, "train", _with_engine)
    yield Replacement(module.PPOTrainer, "generate_completions", _with_engine)
    yield Replacement(module, "batch_generation", functools.partial(_batch_generation, module))


def _init(owner: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        # After accelerate has put the policy where it is trained
        policy = self.accelerator.unwrap_model(self.model).policy
        sampler.told(self, agreed(_overridden(self, owner) or _shaped(policy)) or _moved(self, policy), _ROUTED)
        return result

    return method


def _overridden(trainer: Any, owner: Any) -> str | None:
    """Say which method of a subclass goes around the engine, or return `None`."""
    changed = [name for name in METHODS if getattr(type(trainer), name) is not getattr(owner, name)]
    return f"it overrides {changed[0]}" if changed else None


def _shaped(policy: Any) -> str | None:
    """Say what the policy's own generation configuration does to scores, or return `None`.

    transformers applies it beside TRL's, and TRL's log-probabilities are of the scores after that.
    """
    for name, value in policy.generation_config.to_diff_dict().items():
        if name in _HARMLESS or name.startswith(_REPORTING) or value in (None, _NEUTRAL.get(name)) or value is False:
            continue
        return f"the policy's generation_config sets {name}={value!r}, which changes what the log-probabilities are of"
    return None


def _moved(trainer: Any, policy: Any) -> str | None:
    """Start the engine; where that is declined, say why."""
    args = trainer.args
    try:
        trainer.vllm_generation = sampler.start(
            policy,
            trainer,
            max_num_seqs=args.local_batch_size,
            max_completion_length=args.response_length,
        )
    except EngineDeclinedError as error:
        return str(error)
    return None


def _with_engine(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _GENERATION.set(getattr(self, "vllm_generation", None))
        try:
            return original(self, *args, **kwargs)
        finally:
            _GENERATION.reset(token)

    return method


def _batch_generation(module: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def batch_generation(
        model: Any, queries: torch.Tensor, chunk: int, pad_token_id: int, generation_config: Any
    ) -> tuple[torch.Tensor, Any]:
        generation = _GENERATION.get()
        if generation is None or generation.model is not model:
            return original(model, queries, chunk, pad_token_id, generation_config)
        generation.temperature = generation_config.temperature
        generation.max_completion_length = generation_config.max_new_tokens
        # TRL leaves the stop token to the policy's own configuration, as transformers reads it
        generation.generation_kwargs = sampler.stopping_at(model.generation_config.eos_token_id)
        responses = sampler.sample(generation, queries, queries != pad_token_id, pad_token_id)
        query_responses = torch.cat((queries, responses), dim=1)
        rollout_starts(queries.shape[1])
        return query_responses, _Scores(
            module, generation, query_responses, queries.shape[1], pad_token_id, generation_config.temperature
        )

    return batch_generation


@dataclass(frozen=True)
class _Scores:
    """The scores of a rollout, [B, T, V], of which rows are made when they are asked for: nothing keeps them all.

    Attributes:
        module: TRL's, whose `forward` scores.
        generation: Holds the policy.
        query_responses: Token ids, [B, P + T].
        context_length: P.
        pad_token_id: What is no token.
        temperature: What tokens were drawn at.
    """

    module: ModuleType
    generation: Any
    query_responses: torch.Tensor
    context_length: int
    pad_token_id: int
    temperature: float

    @torch.no_grad()
    def __getitem__(self, rows: slice) -> Any:
        accelerator = self.generation.accelerator
        with accelerator.autocast():  # the policy alone does not enter it; the training pass, through its wrapper, does
            output = self.module.forward(self.generation.model, self.query_responses[rows], self.pad_token_id)
        logits = output.logits[:, self.context_length - 1 : -1]
        if accelerator.mixed_precision != "no":
            logits = logits.float()  # as accelerate does with what the training pass returns
        logits /= self.temperature
        return logits
