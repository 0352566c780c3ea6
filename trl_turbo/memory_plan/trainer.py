"""A plan read off a trainer: what is there already is taken as it is, the rest is predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from trl_turbo.engine.sizing import PROMPT_GUESS
from trl_turbo.memory_plan import sizes as model_sizes
from trl_turbo.memory_plan.prediction import CONTEXT_BYTES, FEATURES, Settings, make
from trl_turbo.memory_plan.table import LENGTHS, MemoryPlan
from trl_turbo.report import applied_features

KINDS = {
    "GRPOTrainer": "grpo",
    "RLOOTrainer": "rloo",
    "DPOTrainer": "dpo",
    "OnlineDPOTrainer": "online_dpo",
    "PPOTrainer": "ppo",
}
#: More than a context takes: what is in use beyond it belongs to other processes.
LARGEST_CONTEXT = 2 << 30


def plan(trainer: Any) -> MemoryPlan:
    """Predict where the memory of a trainer's device goes, in rollouts and in training.

    Print it, or read `moments`, `peak_bytes`, `fits` and `longest_sequence()`. Costs no memory and no step.

    Args:
        trainer: A GRPO, RLOO, DPO, OnlineDPO or PPO trainer of TRL's, constructed.

    Returns:
        The plan, for the features of `patch()` that are applied now.

    Raises:
        TypeError: It is none of these trainers.
        ValueError: It is sharded over processes.
    """
    kind = next((KINDS[scope.__name__] for scope in type(trainer).__mro__ if scope.__name__ in KINDS), None)
    if kind is None:
        raise TypeError(f"there is no plan for an instance of {type(trainer).__name__}; pass one of {', '.join(KINDS)}")
    if _sharded(trainer):
        raise ValueError("FSDP or DeepSpeed spreads the model over processes; a plan is of one device that has it all")
    model = trainer.accelerator.unwrap_model(trainer.model)
    policy = getattr(model, "policy", model)  # PPO's wrapper of policy and value model
    sizes = model_sizes.of_model(policy)
    engine = _engine(trainer)
    settings = _settings(trainer, kind, sizes, engine)
    gpu_bytes, context = _device(next(policy.parameters()).device, engine)
    return make(
        sizes,
        settings,
        gpu_bytes=gpu_bytes,
        context_bytes=context,
        known=dict(_known(trainer, policy, sizes.weight_bytes, engine)),
    )


def _sharded(trainer: Any) -> bool:
    return bool(getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False))


def _settings(trainer: Any, kind: str, sizes: Any, engine: Any) -> Settings:
    args = trainer.args
    micro = args.per_device_train_batch_size
    completion, prompt = _lengths(trainer, kind)
    on = applied_features()
    colocated = bool(getattr(trainer, "use_vllm", getattr(args, "use_vllm", False)))
    colocated = colocated and getattr(trainer, "vllm_mode", getattr(args, "vllm_mode", "colocate")) == "colocate"
    shared = getattr(engine, "shared", None)
    return Settings(
        trainer=kind,
        group=_group(args, kind),
        prompt=prompt,
        completion=completion,
        micro_batch=micro,
        gradient_checkpointing=bool(args.gradient_checkpointing),
        vllm=colocated,
        releases_kv=shared.can_release if shared is not None else bool(getattr(args, "vllm_enable_sleep_mode", False)),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        features=tuple(name for name in FEATURES if name in on),
        # Prompts of one group are alike, completions are not
        padded=micro > 1 or kind in ("dpo", "online_dpo"),
        kv_itemsize=sizes.itemsize,
    )


def _lengths(trainer: Any, kind: str) -> tuple[int, int]:
    """Completion and prompt tokens, as far as the configuration says."""
    args = trainer.args
    completion = getattr(args, LENGTHS.get(kind, "max_completion_length"), None) or PROMPT_GUESS
    if kind == "dpo":  # prompt and completion together; a completion is the larger part of what is scored
        prompt = min(getattr(args, "max_prompt_length", None) or completion // 4, completion - 1)
        return completion - prompt, prompt
    whole = getattr(args, "vllm_max_model_length", None) or getattr(args, "max_length", None)
    prompt = getattr(args, "max_prompt_length", None)
    if prompt is None:
        prompt = whole - completion if whole and whole > completion else PROMPT_GUESS
    return completion, max(1, prompt)


def _group(args: Any, kind: str) -> int:
    if kind in ("grpo", "rloo"):
        steps = getattr(args, "steps_per_generation", None) or args.gradient_accumulation_steps
        return int(args.per_device_train_batch_size * steps)
    if kind == "ppo":
        return int(getattr(args, "local_rollout_forward_batch_size", args.per_device_train_batch_size))
    return 2 * int(args.per_device_train_batch_size)


def _engine(trainer: Any) -> Any:
    return getattr(getattr(trainer, "vllm_generation", trainer), "llm", None)


def _known(trainer: Any, policy: Any, weights: int, engine: Any) -> Iterator[tuple[str, int]]:
    """Parts that are there already, in bytes."""
    own = {p.data_ptr() for p in policy.parameters()}
    models = _modules(trainer)
    others = {p.data_ptr(): p.nbytes for m in models for p in m.parameters() if p.data_ptr() not in own}
    yield "other models", sum(others.values())
    optimizer = getattr(trainer, "optimizer", None)
    state = [t for held in getattr(optimizer, "state", {}).values() for t in held.values() if torch.is_tensor(t)]
    if state:
        yield "optimizer", sum(t.nbytes for t in state)
    if engine is None:
        return
    if getattr(engine, "shared", None) is None:  # TRL's own, or ours that declined
        yield "engine's weights", weights
        return
    found = engine.memory_report()
    if not found.kv_released:
        yield "KV cache", found.kv_bytes
    yield "CUDA graphs", found.graph_bytes
    yield "engine's weights", found.copied_bytes + found.padding_bytes
    yield "engine's adapter", found.lora_bytes


def _modules(trainer: Any) -> Iterator[nn.Module]:
    for name in ("ref_model", "reward_model", "value_model"):
        module = getattr(trainer, name, None)
        if isinstance(module, nn.Module):
            yield module
    yield from (module for module in getattr(trainer, "reward_funcs", None) or () if isinstance(module, nn.Module))


def _device(device: torch.device, engine: Any) -> tuple[int | None, int]:
    """Size of the device, and what the context takes: measured, where torch's allocator alone is beside it."""
    if device.type != "cuda":
        return None, CONTEXT_BYTES
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved(device)
    # Kernels are loaded as they are used: early on there are fewer. vLLM's own are counted as the engine's
    measured = engine is None and context < LARGEST_CONTEXT
    return total, max(context, CONTEXT_BYTES) if measured else CONTEXT_BYTES


def planned(trainer: Any) -> tuple[MemoryPlan | None, str]:
    """The plan of a trainer, or why there is none, in a sentence: for where a training must not fail over it."""
    try:
        return plan(trainer), ""
    except Exception as error:
        return None, f"there is no plan for this {type(trainer).__name__} ({type(error).__name__}: {error})"


def phases_of(found: MemoryPlan) -> Mapping[str, int]:
    """What each phase is predicted to take, in bytes."""
    sizes = {phase: found.phase_bytes(phase) for phase in ("rollout", "training")}
    return {phase: size for phase, size in sizes.items() if size is not None}
