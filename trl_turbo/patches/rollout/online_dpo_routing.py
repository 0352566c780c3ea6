"""OnlineDPO with `use_vllm=False`: what it asks of the policy's `generate` comes from a shared engine where it can.

TRL's two paths differ in more than who samples: the one for vLLM hands over text, to which vLLM adds special tokens,
and pads to the longest length there could be. The script chose the other one and keeps it: only `generate` is replaced,
on the policy itself and for this one caller. As with `use_vllm=True`, TRL corrects nothing for the samples' origin.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from trl_turbo.compat.signatures import misfit
from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.engine.together import agreed
from trl_turbo.patches.rollout import sampler
from trl_turbo.patches.rollout.routing import ROUTED
from trl_turbo.patching import Replacement, as_written, extend

PATCH = "rollout.online_dpo_routing"
METHODS = {"_generate": ("self", "model", "prompts"), "training_step": ("self", "model", "inputs")}


def probe(module: ModuleType) -> str | None:
    """Why the module does not fit, or `None`."""
    owner = getattr(module, "OnlineDPOTrainer", None)
    if owner is None:
        return f"{module.__name__} has no OnlineDPOTrainer"
    reason = misfit(owner, METHODS)
    if reason is not None:
        return reason
    names = as_written(owner._generate).__code__.co_names
    missing = [name for name in ("generate", "generation_config") if name not in names]
    return f"OnlineDPOTrainer._generate no longer uses {missing[0]}" if missing else None


def build(module: ModuleType) -> Iterator[Replacement]:
    """The replacements."""
    owner = module.OnlineDPOTrainer
    yield Replacement(owner, "__init__", functools.partial(_init, owner))


def _init(owner: type, original: Callable[..., Any]) -> Callable[..., Any]:
    own = {name: getattr(owner, name) for name in METHODS}

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if not self.args.use_vllm:
            sampler.told(self, agreed(_kept(self, own)) or _moved(self), ROUTED)
        return result

    return method


def _kept(trainer: Any, own: dict[str, Any]) -> str | None:
    """Say why the script's way to sample must stay, or return `None`."""
    for name, method in own.items():
        if getattr(type(trainer), name) is not method:
            return f"it overrides {name}"  # as XPO does, which samples from the policy without its adapter too
    return sampler.asked_of_transformers(trainer.args)


def _moved(trainer: Any) -> str | None:
    """Start the engine and let the policy's `generate` ask it; where that is declined, say why."""
    args = trainer.args
    policy = trainer.accelerator.unwrap_model(trainer.model)
    try:
        trainer.vllm_generation = sampler.start(
            policy,
            trainer,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            model_impl=args.vllm_model_impl,
            trust_remote_code=getattr(args, "trust_remote_code", False),
            max_num_seqs=2 * args.per_device_train_batch_size,
            max_completion_length=args.max_new_tokens,
            repetition_penalty=trainer.repetition_penalty,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k,
            min_p=trainer.min_p,
        )
    except EngineDeclinedError as error:
        return str(error)
    extend(PATCH, Replacement(policy, "generate", functools.partial(_generate, weakref.ref(trainer))))
    return None


def _generate(owner: Callable[[], Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        trainer = owner()
        config = kwargs.get("generation_config")
        # Others ask the policy too, such as a callback that shows samples; this is how the trainer asks
        if trainer is None or args or config is None or config is not trainer.generation_config:
            return original(*args, **kwargs)
        ids, mask, generation = kwargs["input_ids"], kwargs["attention_mask"], trainer.vllm_generation
        given = trainer.args.generation_kwargs or {}
        generation.generation_kwargs = {**sampler.stopping_at(config.eos_token_id), **given}
        responses = sampler.sample(generation, ids, mask, config.pad_token_id)
        return torch.cat((ids, responses), dim=1)

    return generate
