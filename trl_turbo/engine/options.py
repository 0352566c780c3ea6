"""What the settings come to for one engine, and what its user is told of that."""

from __future__ import annotations

from typing import Any

import torch

from trl_turbo.engine import abilities
from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.settings import setting

_MERGED = "the adapter is folded into the base weights for each rollout and taken out again to the bit"
_SERVED = "the adapter is served unmerged: vLLM applies it in every layer"


def merges(dtype: torch.dtype, *, quantised: bool = False) -> tuple[bool, str]:
    """Whether an adapter is folded into the base weights for each rollout, and why, in a sentence.

    Args:
        dtype: What the base computes in.
        quantised: Whether its weights are packed in fewer bits.

    Raises:
        EngineDeclinedError: Folding was asked for and cannot be done.
    """
    asked = setting("rollout_adapter")
    if asked == "merged" and quantised:
        raise EngineDeclinedError(
            "rollout_adapter='merged' folds the adapter into a base in 16 or 32 bits, and the model's is quantised; "
            "set auto or served"
        )
    if asked != "auto":
        return asked == "merged", f"{_MERGED if asked == 'merged' else _SERVED}, as rollout_adapter={asked!r} asks"
    if quantised:
        return False, (
            f"{_SERVED}, because the base is quantised: to fold it in, the base would have to be quantised anew for "
            "each rollout, which does not come back to the bit"
        )
    if dtype.itemsize == 2:
        return True, (
            f"{_MERGED}: on a 16-bit base that samples faster than applying it in every layer "
            "(rollout_adapter='served' does that)"
        )
    name = str(dtype).removeprefix("torch.")
    return False, (
        f"{_SERVED}, because the base is {name} and folding is for a 16-bit one (rollout_adapter='merged' folds it)"
    )


def kv_cache(dtype: torch.dtype, given: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """How the KV cache of a model in this dtype is kept.

    Args:
        dtype: Of the weights.
        given: What the script passes to `LLM`; a dtype there wins.

    Returns:
        Arguments for `vllm.LLM`, and bytes of one element.
    """
    asked = str(given.get("kv_cache_dtype") or setting("rollout_kv_cache_dtype"))
    return ({"kv_cache_dtype": asked}, 1) if asked.startswith("fp8") else ({}, dtype.itemsize)


def cache_note(cache_dtype: str | None, dtype: str, gap: float) -> str:
    """What the user should know of a cache in another dtype than the model's; empty where it is the same.

    Args:
        cache_dtype: As vLLM is told, `None` where it is not.
        dtype: The model's.
        gap: Mean difference of a token's log-prob to the trainer's model, in one sampled answer.
    """
    if not cache_dtype:
        return ""
    return (
        f"the KV cache is {cache_dtype} where the model computes in {dtype}: samples come from a slightly different "
        f"policy than the one that is trained, by {gap:.2g} a token's log-prob in one answer at the start; GRPO's "
        "importance-sampling correction sees that and the other trainers do not"
    )


def bursts(kwargs: dict[str, Any], *, on_gpu: bool, shared: bool) -> tuple[dict[str, Any], str]:
    """Our worker, and the scheduler of bursts unless something in the script's settings is not made for it.

    Args:
        kwargs: For `vllm.LLM`.
        on_gpu: Whether the engine runs on one.
        shared: Whether it reads the trainer's weights.

    Returns:
        Arguments for `vllm.LLM`, and what is slower because this vLLM lacks something, in a sentence.
    """
    if on_gpu:
        from trl_turbo.engine.worker import OWN, SHARED
    else:
        from trl_turbo.engine.cpu_worker import OWN, SHARED
    chosen: dict[str, Any] = {"worker_cls": SHARED if shared else OWN}
    if setting("rollout_burst") == "off" or kwargs.get("speculative_config"):
        return chosen, ""
    if kwargs.get("scheduler_cls") or (on_gpu and kwargs.get("async_scheduling") is False):
        return chosen, ""
    reason = abilities.unburstable()
    if reason is not None:
        return chosen, (
            "every token is scheduled by itself, which is slower on a GPU, because bursts of tokens need a later vLLM: "
            f"{reason}"
        )
    from trl_turbo.engine.burst import AsyncBurstScheduler, BurstScheduler

    # Which one vLLM would take: it schedules ahead on a GPU, and on a CPU it cannot
    chosen["scheduler_cls"] = AsyncBurstScheduler if on_gpu else BurstScheduler
    chosen["async_scheduling"] = on_gpu
    return chosen, ""
