"""Decide how an engine for a trainer is started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from trl_turbo.engine import adapter, four_bit, sizing
from trl_turbo.engine.adapter_config import active_adapter
from trl_turbo.engine.checks import declined
from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.engine.names import base_model
from trl_turbo.engine.serving import Trainee
from trl_turbo.engine.sharing import SharedWeights
from trl_turbo.engine.sizing import Plan

_GIB = 1 << 30
#: How an adapter gets into a rollout: `merged`, `served` or `auto`.
ADAPTER_VARIABLE = "TRL_TURBO_ROLLOUT_ADAPTER"


_MERGED = (
    "the adapter is folded into the base weights for each rollout and taken out again to the bit: on a 16-bit base "
    f"that samples faster than applying it in every layer ({ADAPTER_VARIABLE}=served does that)"
)
_SERVED = (
    "the adapter is applied beside the 4-bit base in every layer: to fold it in, the base would have to be quantised "
    "anew for each rollout, which does not come back to the bit"
)


@dataclass(frozen=True)
class Start:
    """All that is settled before vLLM is called.

    Attributes:
        trainee: Whom the engine serves.
        llm_kwargs: Arguments for `vllm.LLM`.
        weights: What it will share.
        plan: Its sizes.
        serves_adapter: Whether there is an adapter, for which vLLM has buffers.
        merges_adapter: Whether it is folded into the base for each rollout instead.
        quantised: Whether weights of the base are in 4 bits.
        can_release: Whether the KV cache can be given up between rollouts.
    """

    trainee: Trainee
    llm_kwargs: dict[str, Any]
    weights: SharedWeights
    plan: Plan
    serves_adapter: bool
    merges_adapter: bool
    quantised: bool
    can_release: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, in sentences."""
        if self.merges_adapter:
            return (*self.plan.notes, _MERGED)
        if self.serves_adapter and self.quantised:
            return (*self.plan.notes, _SERVED)
        return self.plan.notes

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While open, vLLM's loader takes the trainee's weights."""
        from trl_turbo.engine.loader import sharing

        with sharing(self.weights):
            yield

    def failure(self, error: Exception) -> str:
        """Say in a sentence that vLLM did not start, and where memory went if it ran out."""
        if isinstance(error, torch.OutOfMemoryError):
            return (
                f"vLLM ran out of memory at start: its KV cache takes {self.plan.kv_bytes / _GIB:.1f} GiB beside "
                f"{self.weights.nbytes / _GIB:.1f} GiB of shared weights; lower per_device_train_batch_size, "
                "max_completion_length or vllm_max_model_length"
            )
        return f"vLLM did not start on the trainer's weights ({type(error).__name__}: {error})"


def prepare(trainee: Trainee, given: dict[str, Any]) -> Start:
    """Settle how to start, or decline.

    Args:
        trainee: Whom the engine serves.
        given: What TRL passes to `LLM`; what is not `None` there stays, save what sharing decides (see below).

    Raises:
        EngineDeclinedError: The model, its adapter or a setting cannot be served.
    """
    reason = declined(trainee.model, given, trainee.accelerator)
    if reason is not None:
        raise EngineDeclinedError(reason)
    from trl_turbo.engine.loader import LOAD_FORMAT

    weights = SharedWeights(trainee.model)
    packed = [name for name, slot in weights.slots.items() if four_bit.is_four_bit(slot.parameter)]
    # Of the dtype that vLLM computes in and keeps its cache in: 4-bit weights are bytes
    parameter = next(slot.parameter for name, slot in weights.slots.items() if name not in packed)
    on_gpu = parameter.is_cuda
    served = active_adapter(trainee.model) is not None
    merges = served and _merges(parameter.dtype, quantised=bool(packed))
    free, total = torch.cuda.mem_get_info(parameter.device) if on_gpu else (None, None)
    sizes = sizing.plan(
        base_model(trainee.model).config,
        trainee.work,
        given,
        itemsize=parameter.element_size(),
        free_bytes=free,
        graphs=on_gpu and not given.get("enforce_eager"),
        adapter=served and not merges,  # graphs with and without the adapter, where it may be served later
    )
    kwargs = {name: value for name, value in given.items() if value is not None}
    kwargs |= sizes.llm_kwargs
    kwargs |= adapter.llm_kwargs(trainee.model) if served else {}
    kwargs |= {"load_format": LOAD_FORMAT, "dtype": str(parameter.dtype).removeprefix("torch.")}
    if packed:
        from trl_turbo.engine import four_bit_config

        kwargs |= four_bit_config.llm_kwargs((name.removesuffix(".weight") for name in packed), given)
    if on_gpu and free is not None and total is not None:
        kwargs |= _on_gpu(kwargs, free, total)
    else:
        # vLLM has no sleep mode on a CPU and refuses to start with it; ours gives up nothing there. Compiling would
        # take longer than the rollouts that a CPU is used for.
        kwargs |= {"enable_sleep_mode": False, "enforce_eager": given.get("enforce_eager") is not False}
    return Start(trainee, kwargs, weights, sizes, served, merges, bool(packed), can_release=kwargs["enable_sleep_mode"])


def _merges(dtype: torch.dtype, *, quantised: bool) -> bool:
    asked = os.environ.get(ADAPTER_VARIABLE, "").strip().lower() or "auto"
    if asked not in ("auto", "merged", "served"):
        raise EngineDeclinedError(
            f"{ADAPTER_VARIABLE}={asked!r} is no way to use an adapter; set auto, merged or served"
        )
    if asked == "merged" and quantised:
        raise EngineDeclinedError(
            f"{ADAPTER_VARIABLE}=merged folds the adapter into a base in 16 or 32 bits, and the model's is in 4; set "
            "auto or served"
        )
    return asked == "merged" or (asked == "auto" and dtype.itemsize == 2 and not quantised)


def _on_gpu(kwargs: dict[str, Any], free: int, total: int) -> dict[str, Any]:
    from vllm.platforms import current_platform

    from trl_turbo.engine.worker import QUALNAME

    # vLLM refuses to start where this share of the device is not free, though `kv_cache_memory_bytes` sets the size.
    share = min(kwargs.get("gpu_memory_utilization", 0.9), 0.95 * free / total)
    can_sleep = bool(current_platform.is_sleep_mode_available())
    return {"worker_cls": QUALNAME, "enable_sleep_mode": can_sleep, "gpu_memory_utilization": share}
