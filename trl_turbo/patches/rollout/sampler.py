"""A shared engine for trainers that sample with transformers: prompts go in as they would into `model.generate`.

The engine is in TRL's own `VLLMGeneration`, through which GRPO and RLOO sample: it is started and asked in one way.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.engine.serving import alone
from trl_turbo.engine.together import agreed
from trl_turbo.patches.memory import steps
from trl_turbo.patches.rollout.release import refresh, shared_llm
from trl_turbo.report import note

KEPT = "transformers samples, as the script says"


def told(trainer: Any, reason: str | None, routed: str) -> None:
    """Note what became of a trainer: why it was kept, or that it was routed."""
    text = routed if reason is None else f"{reason}; {KEPT}"
    note("rollout", f"{type(trainer).__name__}: {text}")


def foreign(module: Any) -> str | None:
    """Say why `VLLMGeneration`, as it stands in `module`, would start another engine than ours, or return `None`."""
    from trl_turbo.engine.llm import TurboLLM

    found = getattr(module, "LLM", None)
    if found is None:
        return "TRL found no vLLM that it supports"
    return None if found is TurboLLM else f"its vLLM would be {found.__module__}.{found.__qualname__}"


def asked_of_transformers(args: Any) -> str | None:
    """Say what the script asked of transformers that vLLM does not do, or return `None`."""
    from trl_turbo.engine.llm import sampling_arguments

    for name in ("use_transformers_paged", "use_transformers_continuous_batching", "cache_implementation"):
        if getattr(args, name, None):
            return f"{name} was asked of transformers"
    unknown = sorted(set(getattr(args, "generation_kwargs", None) or {}) - sampling_arguments())
    return f"generation_kwargs has {unknown[0]!r}, which vLLM does not know" if unknown else None


def nameless(model: Any) -> str | None:
    """Say that vLLM could not read the model's configuration, or return `None`."""
    if getattr(model, "name_or_path", ""):
        return None
    return "the model has no name or path from which vLLM could read its configuration"


def unknown_to(known: Mapping[str, Any], generation_class: type) -> str | None:
    """Say what a `VLLMGeneration` of this TRL needs that is not known here, or return `None`."""
    parameters = list(inspect.signature(generation_class.__init__).parameters.values())[1:]  # type: ignore[misc]
    needed = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.name not in known]
    return f"VLLMGeneration needs {needed[0]}, which is not known here" if needed else None


def start(model: Any, trainer: Any, **settings: Any) -> Any:
    """Build a `VLLMGeneration` that shares the weights of `model`.

    Args:
        model: The policy, unwrapped by accelerate, with its adapter.
        trainer: Whose it is.
        settings: Further arguments; those that this TRL does not take are left out.

    Raises:
        EngineDeclinedError: The engine cannot share them; nothing was started.
    """
    module = importlib.import_module("trl.generation.vllm_generation")
    arguments = {
        "model": model,
        "accelerator": trainer.accelerator,
        "is_fsdp_enabled": trainer.is_fsdp_enabled,
        "processing_class": trainer.processing_class,
        "mode": "colocate",
        "logprobs": None,  # nobody reads them
        **settings,
    }
    reason = agreed(foreign(module) or nameless(model) or unknown_to(arguments, module.VLLMGeneration))
    if reason is not None:
        raise EngineDeclinedError(reason)
    taken = inspect.signature(module.VLLMGeneration.__init__).parameters
    with alone():
        return module.VLLMGeneration(**{name: value for name, value in arguments.items() if name in taken})


def stopping_at(eos_token_id: Any) -> dict[str, Any]:
    """Sampling arguments that end a completion where transformers does: at these tokens and at no other.

    vLLM would also stop at those of the checkpoint's own generation configuration, which scripts override.
    """
    ends = list(eos_token_id) if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
    return {"ignore_eos": True, "stop_token_ids": [int(end) for end in ends if end is not None]}


@torch.no_grad()
def sample(generation: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """Sample one response to each prompt from the weights as they are now, and give up the KV cache.

    Args:
        generation: What :func:`start` returned.
        input_ids: Prompts, padded, [B, P].
        attention_mask: What of them is no padding, [B, P].
        pad_token_id: What follows a response that ended.

    Returns:
        Token ids, [B, T], T being the longest response.
    """
    refresh(generation)
    prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
    try:
        with steps.rollout(steps.training()):
            sampled = generation.generate(prompts, None, 1)[1]
    finally:
        shared_llm(generation).release()
    responses = input_ids.new_full((len(sampled), max(map(len, sampled))), pad_token_id)
    for row, ids in zip(responses, sampled, strict=True):
        row[: len(ids)] = torch.tensor(list(ids))
    return responses
