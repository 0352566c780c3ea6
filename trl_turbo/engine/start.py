"""Decide how an engine for a trainer is started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from trl_turbo.engine import abilities, adapter, failure, options, sizing
from trl_turbo.engine.adapter_config import active_adapter
from trl_turbo.engine.checks import declined
from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.engine.names import base_model
from trl_turbo.engine.serving import Trainee
from trl_turbo.engine.sharing import SharedWeights
from trl_turbo.engine.sizing import Plan


@dataclass(frozen=True)
class Start:
    """All that is settled before vLLM is called.

    Attributes:
        trainee: Whom the engine serves.
        llm_kwargs: Arguments for `vllm.LLM`.
        weights: What it will share.
        plan: Its sizes.
        quantised: Whether weights of the base are in 4 bits.
        can_release: Whether the KV cache can be given up between rollouts.
        way: How an adapter is used, and why, in a sentence.
        slower: What this vLLM lacks, in a sentence; empty where it has all.
    """

    trainee: Trainee
    llm_kwargs: dict[str, Any]
    weights: SharedWeights
    plan: Plan
    quantised: bool
    can_release: bool
    way: str = ""
    slower: str = ""

    def notes(self, gap: float) -> tuple[str, ...]:
        """What the user should know, in sentences.

        Args:
            gap: Mean difference of a token's log-prob between vLLM and the trainer's model, as measured at start-up.
        """
        cache = options.cache_note(self.llm_kwargs.get("kv_cache_dtype"), self.llm_kwargs["dtype"], gap)
        return tuple(sentence for sentence in (*self.plan.notes, self.way, cache, self.slower) if sentence)

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
        return failure.sentence(
            error,
            self.sizes(),
            trainer=self.trainee.accelerator is not None,
            cache_given="kv_cache_memory_bytes" in self.llm_kwargs
            and "kv_cache_memory_bytes" not in self.plan.llm_kwargs,
        )

    def sizes(self) -> dict[str, int]:
        """Bytes by part, as far as they are known before the engine runs; 0 where vLLM settles a part itself."""
        graphs = (self.plan.llm_kwargs.get("compilation_config") or {}).get("cudagraph_capture_sizes", ())
        return {
            failure.CACHE: self.plan.kv_bytes,
            failure.WEIGHTS: sum(slot.parameter.nbytes for slot in self.weights.slots.values()),
            failure.GRAPHS: len(graphs) * sizing.GRAPH_BYTES,
            failure.ADAPTER: adapter.buffer_bytes(self.trainee.model, self.llm_kwargs, self.weights.dtype.itemsize),
        }


def prepare(trainee: Trainee, given: dict[str, Any]) -> Start:
    """Settle how to start, or decline.

    Args:
        trainee: Whom the engine serves.
        given: What TRL passes to `LLM`; what is not `None` there stays, save what sharing decides (see below).

    Raises:
        EngineDeclinedError: The model, its adapter or a setting cannot be served.
    """
    device = vllm_device() if trainee.empty else None
    reason = declined(trainee.model, given, trainee.accelerator, device)
    if reason is not None:
        raise EngineDeclinedError(reason)
    from trl_turbo.engine.loader import CHECKPOINT_FORMAT, LOAD_FORMAT

    weights = SharedWeights(trainee.model)
    device = device or next(iter(weights.slots.values())).parameter.device
    on_gpu = device.type == "cuda"
    served = active_adapter(trainee.model) is not None
    packed = weights.packed
    merges, way = options.merges(weights.dtype, quantised=bool(packed)) if served else (False, "")
    kv_kwargs, kv_itemsize = options.kv_cache(weights.dtype, given)
    free, total = torch.cuda.mem_get_info(device) if on_gpu else (None, None)
    # What vLLM loads itself is not allocated yet
    unloaded = sum(slot.parameter.nbytes for slot in weights.slots.values()) if trainee.empty else 0
    sizes = sizing.plan(
        base_model(trainee.model).config,
        trainee.work,
        given,
        itemsize=kv_itemsize,
        free_bytes=max(0, free - unloaded) if free is not None else None,
        graphs=on_gpu and not given.get("enforce_eager"),
        adapter=served and not merges,  # graphs with and without the adapter, where it may be served later
    )
    if trainee.empty and given.get("gpu_memory_utilization") and not given.get("kv_cache_memory_bytes"):
        # The weights are in vLLM's own accounting here, so that it can size the cache by a share of the device
        left = {name: value for name, value in sizes.llm_kwargs.items() if name != "kv_cache_memory_bytes"}
        sizes = replace(sizes, llm_kwargs=left, kv_bytes=0, notes=())
    kwargs = {name: value for name, value in given.items() if value is not None}
    kwargs |= sizes.llm_kwargs | kv_kwargs
    kwargs |= adapter.llm_kwargs(trainee.model, trainee.max_lora_rank)
    load_format = CHECKPOINT_FORMAT if trainee.empty else LOAD_FORMAT
    kwargs |= {"load_format": load_format, "dtype": str(weights.dtype).removeprefix("torch.")}
    if packed:
        from trl_turbo.engine import four_bit_config

        kwargs |= four_bit_config.llm_kwargs((name.removesuffix(".weight") for name in packed), given)
    if on_gpu and free is not None and total is not None:
        kwargs |= _on_gpu(kwargs, free, total)
    else:
        # vLLM has no sleep mode on a CPU and refuses to start with it; ours gives up nothing there. Compiling would
        # take longer than the rollouts that a CPU is used for.
        kwargs |= {"enable_sleep_mode": False, "enforce_eager": given.get("enforce_eager") is not False}
    if kwargs.get("max_model_len") == -1 and not abilities.fits_length():
        kwargs |= {"max_model_len": _longest(kwargs, base_model(trainee.model).config, sizes, on_gpu)}
    if "compilation_config" in sizes.llm_kwargs:
        kwargs["compilation_config"] = abilities.compilation(kwargs["compilation_config"])
    bursts, slower = options.bursts(kwargs, on_gpu=on_gpu, shared=True)
    return Start(
        trainee, kwargs | bursts, weights, sizes, bool(packed), kwargs["enable_sleep_mode"], way=way, slower=slower
    )


def _longest(kwargs: dict[str, Any], config: Any, sizes: Plan, on_gpu: bool) -> int | None:
    """The longest sequence that the cache holds, for a vLLM that does not find it; `None` for the model's own limit."""
    # A CPU's cache is sized by VLLM_CPU_KVCACHE_SPACE there, whatever it is told
    if not on_gpu or not sizes.kv_bytes:
        return None
    return sizing.longest(config, sizes, kwargs.get("block_size"))


def vllm_device() -> torch.device:
    """The device on which vLLM puts its model in this process."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    launched = int(os.environ.get("WORLD_SIZE") or 1) > 1
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0) if launched else 0)


def _on_gpu(kwargs: dict[str, Any], free: int, total: int) -> dict[str, Any]:
    from vllm.platforms import current_platform

    # vLLM refuses to start where this share of the device is not free, though `kv_cache_memory_bytes` sets the size.
    share = min(kwargs.get("gpu_memory_utilization", 0.9), 0.95 * free / total)
    can_sleep = bool(current_platform.is_sleep_mode_available())
    return {"enable_sleep_mode": can_sleep, "gpu_memory_utilization": share}
