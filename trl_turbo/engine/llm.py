"""`TurboLLM`: what stands where TRL writes `LLM(...)`."""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vllm
from vllm.distributed import get_tp_group

from trl_turbo.engine import abilities, failure, served
from trl_turbo.engine.adapter_config import active_adapter
from trl_turbo.engine.checks import declined, parallelism, unservable
from trl_turbo.engine.errors import EngineDeclinedError, WeightsMovedError
from trl_turbo.engine.fast_generate import FastGenerate
from trl_turbo.engine.memory import MemoryReport
from trl_turbo.engine.served import ServedEngine
from trl_turbo.engine.serving import Trainee, must_share, take
from trl_turbo.engine.shared import SharedEngine
from trl_turbo.engine.sizing import LITTLE_CACHE
from trl_turbo.engine.start import Start, prepare
from trl_turbo.engine.together import gathered, together
from trl_turbo.report import logger, note


class TurboLLM(vllm.LLM):
    """A `vllm.LLM` that reads the weights of the trainer that builds it, or takes its adapter where it cannot.

    Built outside a trainer, or for one that is declined, it is vLLM's own class in everything.

    Attributes:
        shared: The shared engine, or `None` where this is none.
        served: The engine with a base of its own and the trainer's adapter, or `None` where this is none.
        declined: Why it is a plain one, in a sentence; empty where nobody asked or it is one of the two.
    """

    shared: SharedEngine | None = None
    served: ServedEngine | None = None
    declined: str = ""
    _ids_only = False
    _ranks: Any = None  # vLLM's group of those that hold this engine together, where there are several

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        trainee = take()
        if trainee is None:
            super().__init__(*args, **kwargs)
            return
        fast = FastGenerate.of(trainee.model)
        running = fast.llm if fast is not None else None
        apart = parallelism(trainee.model, kwargs, trainee.accelerator)
        try:
            if running is None and apart is not None:
                self._serve(apart, trainee, args, kwargs)
            else:
                with together():
                    if running is not None:
                        self._join(running, trainee, kwargs)
                    else:
                        self._start(trainee, args, kwargs)
                if fast is not None and running is None:
                    fast.llm = self
        except EngineDeclinedError as error:
            logger.debug("the engine is declined", exc_info=True)
            self.declined = str(error)
        except ImportError as error:
            # Every rank has the same vLLM, so all of them are here
            logger.debug("the engine is declined", exc_info=True)
            self.declined = failure.unprepared(error, vllm.__version__)
        if self.declined:
            # Outside the handler: its traceback holds the engine that was given up, and that one's memory
            self._give_up()
            if must_share():
                raise EngineDeclinedError(self.declined)
            note("rollout", f"{self.declined}; TRL's own engine is used, with a copy of the weights")
            super().__init__(*args, **kwargs)
        if (kwargs.get("tensor_parallel_size") or 1) > 1:
            self._ranks = get_tp_group()

    # -- start -------------------------------------------------------------------------------------------------------

    def _start(self, trainee: Trainee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            start = prepare(trainee, kwargs)
        except EngineDeclinedError:
            raise
        except Exception as error:
            raise EngineDeclinedError(failure.unprepared(error, vllm.__version__)) from error
        # vLLM's engine core must live in this process to see the trainer's tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            with start.loading(), _nothing_collected():
                super().__init__(*args, **start.llm_kwargs)
            self._finish(start)
        except EngineDeclinedError:
            raise
        except Exception as error:
            said = (
                failure.unprepared(error, vllm.__version__) if isinstance(error, ImportError) else start.failure(error)
            )
            raise EngineDeclinedError(said) from error

    def _finish(self, start: Start) -> None:
        if not len(start.weights):
            # As vLLM does for a checkpoint that is quantised, whatever `load_format` says
            raise EngineDeclinedError(
                "vLLM took another loader than that of the trainer's weights and has its own copy"
            )
        self.shared = SharedEngine(start, self.llm_engine.model_executor.driver_worker)
        gap = self.shared.compare(self._sample)
        if gap.reason is not None:
            raise EngineDeclinedError(gap.reason + start.suspicion)
        self._reset()
        for sentence in start.notes(gap.mean):
            note("rollout", sentence)

    def _serve(self, reason: str, trainee: Trainee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start vLLM on its own base weights and put the trainee's adapter into it.

        What vLLM raises at its start is raised: the other ranks wait for this one inside vLLM, and a rank that went on
        alone would leave them there.
        """
        if must_share() or trainee.empty or active_adapter(trainee.model) is None:
            raise EngineDeclinedError(reason)
        obstacle = unservable(trainee.model, kwargs, trainee.accelerator)
        if obstacle is not None:
            raise EngineDeclinedError(f"{reason}, and the adapter cannot be pushed alone: {obstacle}")
        from trl_turbo.engine.loader import plain_cpu_linears  # looks up a loader of vLLM's

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            with plain_cpu_linears(), _nothing_collected():
                super().__init__(*args, **served.llm_kwargs(trainee, kwargs))
        except ValueError as error:
            if "LoRA" not in str(error):
                raise
            # Said of the model's class, so of every rank at the same point
            raise EngineDeclinedError(f"{reason}, and vLLM takes no adapter for this model ({error})") from error
        self.served = ServedEngine(trainee, self.llm_engine.model_executor.driver_worker, reason)
        gap = self.served.compare(self._sample)
        if gap is not None:
            raise EngineDeclinedError(
                f"{reason}, and vLLM's base weights, which it reads from {kwargs.get('model')}, are not the trainer's: "
                f"{gap}"
            )
        self._reset()
        note("rollout", self.served.way)

    def _join(self, running: TurboLLM, trainee: Trainee, kwargs: dict[str, Any]) -> None:
        """Be the engine that the trainee's model has already: one state behind two objects."""
        shared = running.shared
        if shared is None:
            raise EngineDeclinedError(
                "the model's engine was given up, and the trainer asks for it; load the model again with "
                "trl_turbo.from_pretrained"
            )
        reason = declined(trainee.model, kwargs, trainee.accelerator) or running._other_logprobs(kwargs)
        if reason is not None:
            raise EngineDeclinedError(reason)
        running.refresh()
        reason = shared.compare(running._sample).reason
        if reason is not None:
            raise EngineDeclinedError(reason)
        running._reset()
        for sentence in (*shared.shortfalls(trainee.work, kwargs), shared.way):
            if sentence:
                note("rollout", sentence)
        self.__dict__ = running.__dict__

    def _other_logprobs(self, kwargs: dict[str, Any]) -> str | None:
        own = self.llm_engine.vllm_config.model_config.logprobs_mode
        asked = kwargs.get("logprobs_mode") or own
        return None if asked == own else f"the trainer asks for {asked} and the model's engine gives {own}"

    def _sample(self, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
        """Sample one answer at temperature 1: ids and their log-probs, [T]."""
        params = vllm.SamplingParams(
            temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False, seed=0
        )
        output = self.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
        ids = list(output.token_ids)
        return ids, [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)]

    def _give_up(self) -> None:
        """Free what was started, but not `torch.distributed`, which the trainer needs and vLLM's shutdown destroys."""
        self.shared = self.served = None
        engine = self.__dict__.pop("llm_engine", None)
        if engine is not None:
            client = engine.engine_core
            finalizer = getattr(client, "_finalizer", None)  # from vLLM 0.31: it would destroy it when collected
            if finalizer is not None:
                finalizer.detach()
            client.engine_core.model_executor.shutdown()
            client.engine_core.scheduler.shutdown()
        del engine
        gc.collect()
        _release_pools()

    # -- weights -----------------------------------------------------------------------------------------------------

    @property
    def follows(self) -> bool:
        """Whether :meth:`refresh` is all that the trainer's weights need to get here."""
        return self.shared is not None or self.served is not None

    def refresh(self) -> None:
        """Make the next rollout sample from the weights as they are now. Call after each optimizer step, on each rank.

        Base weights need nothing but a check that they are where they were; the adapter is copied into vLLM's buffers;
        what the prefix cache holds belongs to the old weights.

        Raises:
            EngineDeclinedError: The adapter is no longer one that is served.
            WeightsMovedError: A weight changed its shape, dtype or device.
            RuntimeError: Requests are in flight, so that the prefix cache cannot be dropped.
        """
        engine = self.shared or self.served
        if engine is None:
            return
        if self.served is not None and self.served.weights_asleep:
            torch.cuda.empty_cache()
            self.wake_up(["weights"])
        engine.refresh()
        self._reset()

    def _reset(self) -> None:
        dropped = super().reset_prefix_cache()
        if dropped is None:  # vLLM up to 0.11 tells only inside
            dropped = self.llm_engine.engine_core.engine_core.scheduler.reset_prefix_cache()
        if not dropped:
            raise RuntimeError(
                "vLLM kept its prefix cache because requests are still running, so the next rollout would mix old and "
                "new weights; let generate() return before the next optimizer step"
            )

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(self, prompts: Any, sampling_params: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `vllm.LLM.generate`, with the trainer's adapter and after a check of the weights.

        Where ranks that hold one vLLM together ask it for different prompts, each gets the answers to its own.

        Raises:
            WeightsMovedError: A weight changed its shape, dtype or device since the engine started.
        """
        own = None
        if self._ranks is not None:
            prompts, own = gathered(prompts, self._ranks.cpu_group, self._ranks.rank_in_group)
        if own is None:
            return self._sampled(prompts, sampling_params, *args, **kwargs)
        note(
            "rollout",
            "the ranks that hold one vLLM together ask it for different prompts, which TRL does not gather here: "
            "they are sampled together, since shards cannot sample apart, and each rank takes its own answers",
        )
        return self._sampled(prompts, sampling_params, *args, **kwargs)[own]

    def _sampled(self, prompts: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        engine = self.shared or self.served
        if engine is None:
            return super().generate(prompts, sampling_params, *args, **kwargs)
        if engine.check():
            self._reset()
        self._wake()
        if self._ids_only:
            sampling_params = _without_text(sampling_params)
        with engine.adapted() as request:
            if request is not None:
                kwargs.setdefault("lora_request", request)
            return super().generate(prompts, sampling_params, *args, **kwargs)

    @contextmanager
    def ids_only(self) -> Iterator[None]:
        """While open, completions come without text: their caller reads token ids alone.

        Seen on one H200, 64 sequences: 3.22 against 4.83 ms a decode step.
        """
        before, self._ids_only = self._ids_only, True
        try:
            yield
        finally:
            self._ids_only = before

    # -- memory ------------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Give up the KV cache's memory until the next rollout; weights, adapter buffers and graphs stay."""
        shared = self.shared
        if shared is not None and shared.can_release and not shared.kv_released:
            # Level 1 empties the pool `kv_cache`; the pool `weights` has nothing in it, see `worker`.
            super().sleep(level=1)
            shared.kv_released = True

    def _wake(self) -> None:
        shared = self.shared
        if shared is not None and shared.kv_released:
            # What training left in torch's cache would stand beside the KV cache, and a step's peak be their sum. Where
            # the KV cache is little of it, they may: full fine-tuning of 8B parameters leaves some 30 GiB in pieces
            # there, which the driver would have to give out anew in each step.
            little = shared.released_bytes <= LITTLE_CACHE * torch.cuda.memory_reserved()
            if not little or torch.cuda.mem_get_info()[0] < 2 * shared.released_bytes:
                torch.cuda.empty_cache()
            super().wake_up()
            shared.kv_released = False

    def sleep(self, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; a shared engine gives up its KV cache alone, whatever the level: the weights are the trainer's.

        One that serves an adapter keeps its base in the host's memory, where TRL's level 2 would throw it away: no sync
        brings it back.
        """
        if self.served is not None:
            self.served.weights_asleep = True
            return super().sleep(1, *args, **kwargs)
        if self.shared is None:
            return super().sleep(level, *args, **kwargs)
        self.release()
        return None

    def wake_up(self, tags: list[str] | None = None) -> Any:
        """As vLLM's; a shared engine's weights are always awake."""
        if self.served is not None and (tags is None or "weights" in tags):
            self.served.weights_asleep = False
        if self.shared is None:
            return super().wake_up(tags)
        if tags is None or "kv_cache" in tags:
            self._wake()
        return None

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, save `reload_weights`: TRL 0.29.1 to 1.9 call it after a sync, which loads the first checkpoint.

        Answers huggingface/trl's work-around for vllm-project/vllm#29341; can go with TRL 1.9.
        """
        if self.follows and method == "reload_weights":
            return [None]
        return super().collective_rpc(method, *args, **kwargs)

    def memory_report(self) -> MemoryReport:
        """Say what the engine costs, by part.

        Raises:
            RuntimeError: The engine is not shared.
        """
        if self.shared is None:
            reason = self.declined or "it was not built by a trainer"
            raise RuntimeError(
                f"memory_report() is of an engine that shares the trainer's weights, and this one has its own "
                f"({reason}); ask only where llm.shared is not None"
            )
        return self.shared.memory_report()


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Collect garbage now, and none while this is open.

    CUDA graphs of an engine that is gone, such as that of a notebook's last trainer, are garbage in cycles; one that is
    destroyed while vLLM captures graphs makes the capture fail (seen with vLLM 0.26).
    """
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _release_pools() -> None:
    """Let go of the memory pools of an engine that was given up: the next one would abort the process over them.

    vLLM's worker does it when it shuts down, which one that never came to be does not.
    """
    abilities.forget_graph_pool()
    module = sys.modules.get("vllm.device_allocator.cumem")
    allocator = module.CuMemAllocator.instance if module is not None else None
    # Memory that is still held is another engine's, which goes on
    if allocator is not None and hasattr(allocator, "release_pools") and not allocator.pointer_to_data:
        allocator.release_pools()


def _without_text(params: Any) -> Any:
    """The same sampling parameters without detokenising, save where stop strings need the text."""
    if isinstance(params, (list, tuple)):
        return [_without_text(p) for p in params]
    if params is None or not params.detokenize or params.stop:
        return params
    params = params.clone()
    params.detokenize = False
    return params


def sampling_arguments() -> set[str]:
    """What `SamplingParams` takes, as `generation_kwargs` may name it."""
    return set(inspect.signature(vllm.SamplingParams).parameters)


def replaceable(module: Any) -> str | None:
    """Say why `LLM` in a module of TRL's is not vLLM's own class, for which `TurboLLM` may stand, or return `None`."""
    found = getattr(module, "LLM", None)
    if found is None:
        return f"{module.__name__} has no LLM: TRL found no vLLM that it supports"
    if found is not vllm.LLM:
        return f"LLM in {module.__name__} is {found.__module__}.{found.__qualname__} and not vLLM's own"
    return None


__all__ = ["EngineDeclinedError", "TurboLLM", "WeightsMovedError", "replaceable", "sampling_arguments"]
