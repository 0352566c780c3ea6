"""Decide how an engine for a trainer is started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from trl_turbo.engine import adapter, options, sizing
from trl_turbo.engine.adapter_config import active_adapter
from trl_turbo.engine.checks import declined
from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.engine.names import base_model
from trl_turbo.engine.serving import Trainee
from trl_turbo.engine.sharing import SharedWeights
from trl_turbo.engine.sizing import Plan

_GIB = 1 << 30


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
        can_release: Whether the KV cache can be given up between rollouts.
        way: How an adapter is used, and why, in a sentence.
    """

    trainee: Trainee
    llm_kwargs: dict[str, Any]
    weights: SharedWeights
    plan: Plan
    serves_adapter: bool
    merges_adapter: bool
    can_release: bool
    way: str = ""

    def notes(self, gap: float) -> tuple[str, ...]:
        """What the user should know, in sentences.

        Args:
            gap: Mean difference of a token's log-prob between vLLM and the trainer's model, as measured at start-up.
        """
        cache = options.cache_note(self.llm_kwargs.get("kv_cache_dtype"), self.llm_kwargs["dtype"], gap)
        return tuple(sentence for sentence in (*self.plan.notes, self.way, cache) if sentence)

    @property
    def suspicion(self) -> str:
        """What may explain log-probs that differ, to end a sentence with; most often nothing."""
        dtype = self.llm_kwargs.get("kv_cache_dtype")
        return f"; the KV cache is {dtype}, and rollout_kv_cache_dtype='auto' keeps the model's own" if dtype else ""

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
    parameter = next(iter(weights.slots.values())).parameter
    on_gpu = parameter.is_cuda
    served = active_adapter(trainee.model) is not None
    merges, way = options.merges(parameter.dtype) if served else (False, "")
    kv_kwargs, kv_itemsize = options.kv_cache(parameter.dtype, given)
    free, total = torch.cuda.mem_get_info(parameter.device) if on_gpu else (None, None)
    sizes = sizing.plan(
        base_model(trainee.model).config,
        trainee.work,
        given,
        itemsize=kv_itemsize,
        free_bytes=free,
        graphs=on_gpu and not given.get("enforce_eager"),
        adapter=served and not merges,  # graphs with and without the adapter, where it may be served later
    )
    kwargs = {name: value for name, value in given.items() if value is not None}
    kwargs |= sizes.llm_kwargs | kv_kwargs
    kwargs |= adapter.llm_kwargs(trainee.model) if served else {}
    kwargs |= {"load_format": LOAD_FORMAT, "dtype": str(parameter.dtype).removeprefix("torch.")}
    if on_gpu and free is not None and total is not None:
        kwargs |= _on_gpu(kwargs, free, total)
    else:
        # vLLM has no sleep mode on a CPU and refuses to start with it; ours gives up nothing there. Compiling would
        # take longer than the rollouts that a CPU is used for.
        kwargs |= {"enable_sleep_mode": False, "enforce_eager": given.get("enforce_eager") is not False}
    return Start(trainee, kwargs, weights, sizes, served, merges, kwargs["enable_sleep_mode"], way)


def _on_gpu(kwargs: dict[str, Any], free: int, total: int) -> dict[str, Any]:
    from vllm.platforms import current_platform

    from trl_turbo.engine.worker import QUALNAME

    # vLLM refuses to start where this share of the device is not free, though `kv_cache_memory_bytes` sets the size.
    share = min(kwargs.get("gpu_memory_utilization", 0.9), 0.95 * free / total)
    can_sleep = bool(current_platform.is_sleep_mode_available())
    return {"worker_cls": QUALNAME, "enable_sleep_mode": can_sleep, "gpu_memory_utilization": share}
