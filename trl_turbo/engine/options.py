"""What the settings come to for one engine, and what its user is told of that."""

from __future__ import annotations

from typing import Any

import torch

from trl_turbo.settings import setting

_MERGED = "the adapter is folded into the base weights for each rollout and taken out again to the bit"
_SERVED = "the adapter is served unmerged: vLLM applies it in every layer"


def merges(dtype: torch.dtype) -> tuple[bool, str]:
    """Whether an adapter is folded into a base of this dtype for each rollout, and why, in a sentence."""
    asked = setting("rollout_adapter")
    if asked != "auto":
        return asked == "merged", f"{_MERGED if asked == 'merged' else _SERVED}, as rollout_adapter={asked!r} asks"
    if dtype.itemsize == 2:
        return True, (
            f"{_MERGED}: on a 16-bit base that samples faster than applying it in every layer "
            "(rollout_adapter='served' does that)"
        )
    name = str(dtype).removeprefix("torch.")
    return False, (
        f"{_SERVED}, because the base is {name} and folding is for a 16-bit one (rollout_adapter='merged' folds it)"
    )


def kv_cache(dtype: torch.dtype, given: dict[str, Any]) -> tuple[dict[str, Any], int, tuple[str, ...]]:
    """How the KV cache of a model in this dtype is kept.

    Args:
        dtype: Of the weights.
        given: What the script passes to `LLM`; a dtype there wins.

    Returns:
        Arguments for `vllm.LLM`, bytes of one element, and what the user should know.
    """
    asked = given.get("kv_cache_dtype") or setting("rollout_kv_cache_dtype")
    if not str(asked).startswith("fp8"):
        return {}, dtype.itemsize, ()
    name = str(dtype).removeprefix("torch.")
    note = (
        f"the KV cache holds {asked} where the model computes in {name}, {dtype.itemsize} times the tokens in the same "
        "memory: samples come from a slightly different policy than the one that is trained, which GRPO's "
        "importance-sampling correction sees and the other trainers do not"
    )
    return {"kv_cache_dtype": asked}, 1, (note,)
