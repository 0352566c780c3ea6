"""A running engine that reads the trainer's weights: what it shares, serves and costs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trl_turbo.engine import options, parity
from trl_turbo.engine.adapter import ServedAdapter
from trl_turbo.engine.adapter_config import active_adapter, adapter_declined, adapter_layers
from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.engine.four_bit import FOUR_BIT_DTYPE
from trl_turbo.engine.memory import MemoryReport
from trl_turbo.engine.merged import Fold, LogTooLargeError
from trl_turbo.engine.names import base_model
from trl_turbo.engine.sizing import Work, shortfalls
from trl_turbo.engine.start import Start
from trl_turbo.report import note

_Sample = Callable[[list[int], int], tuple[list[int], list[float]]]


class SharedEngine:
    """The state behind a shared `TurboLLM`.

    Args:
        start: What it was started with.
        worker: vLLM's worker in this process.

    Attributes:
        weights: The shared weights.
        adapter: The adapter in vLLM's buffers, or `None`.
        fold: The adapter's way into the base weights, where it is merged for each rollout, or `None`.
        way: How the adapter is used, and why, in a sentence; empty without one.
        can_release: Whether the KV cache can be given up between rollouts.
        kv_released: Whether it is given up at the moment.
    """

    def __init__(self, start: Start, worker: Any) -> None:
        self._model = start.trainee.model
        # The adapter is looked for here: PEFT's wrapper may come after the engine started, and go before it ends
        self._base = base_model(self._model)
        self._worker = worker
        self._quantised = start.quantised
        self._token_bytes = start.plan.token_bytes
        self._kv_bytes = start.plan.kv_bytes or self._cached_tokens() * self._token_bytes
        self.weights = start.weights
        self.can_release = start.can_release
        self.kv_released = False
        self.adapter: ServedAdapter | None = None
        self.fold: Fold | None = None
        self.way = ""
        self._followed: tuple[str | None, tuple[Any, ...]] = (None, ())
        self._follow()

    def _follow(self) -> None:
        """Serve the adapter that the model applies now: it may have come, gone, or been merged since."""
        name = active_adapter(self._base)
        layers = adapter_layers(self._base, name) if name is not None else {}
        before, kept = self._followed
        if name == before and len(kept) == len(layers) and all(map(operator.is_, kept, layers.values())):
            return
        self.adapter = self.fold = None
        self.way = ""
        self._followed = (None, ())
        if name is not None:
            reason = adapter_declined(self._base)
            if reason is not None:
                raise EngineDeclinedError(reason)
            manager = getattr(self._worker.model_runner, "lora_manager", None)
            if manager is None:
                raise EngineDeclinedError(
                    f"the engine was started without room for an adapter, and {name!r} was added since; load the model "
                    "with max_lora_rank set to its rank"
                )
            adapter = ServedAdapter(self._base, manager)
            adapter.push()
            merges, self.way = options.merges(self.weights.dtype, quantised=self._quantised)
            if merges:
                self.fold = Fold.of_peft(layers, name)
            self.adapter = adapter
        self._followed = (name, tuple(layers.values()))

    @contextmanager
    def adapted(self) -> Iterator[Any]:
        """While open, vLLM samples with the adapter; yields what requests must carry for that, `None` for nothing.

        The base is restored when it closes, whatever happened: nothing else may see merged weights.
        """
        if self.adapter is None:
            yield None
            return
        if self.fold is not None:
            try:
                self.fold.fold()
            except LogTooLargeError as error:
                self.fold = None
                self.adapter.push()
                note("rollout", f"the adapter is served unmerged from now on: {error}")
        if self.fold is None:
            yield self.adapter.request
            return
        try:
            yield None
        finally:
            self.fold.restore()

    def compare(self, sample: _Sample) -> parity.Gap:
        """Compare the log-probs of one sampled answer with those of the trainer's model."""
        prompt = parity.probe_prompt(self._worker.model_config.get_vocab_size())
        ids, logprobs = sample(prompt, parity.SAMPLED_TOKENS)
        return parity.gap(self._model, prompt, ids, logprobs, FOUR_BIT_DTYPE if self._quantised else None)

    def check(self) -> int:
        """Put back what moved; see :meth:`SharedWeights.check`."""
        moved = self.weights.check()
        if moved:
            note(
                "rollout",
                f"{moved} weights of the model were put elsewhere since the engine started; they were copied back into "
                "the memory that vLLM reads",
            )
        return moved

    def refresh(self) -> None:
        """Check the weights and push the adapter."""
        self.check()
        self._follow()
        if self.adapter is not None and self.fold is None:
            self.adapter.push()

    def shortfalls(self, work: Work, given: dict[str, Any]) -> tuple[str, ...]:
        """Say where the engine is smaller than this work, in sentences."""
        config = self._worker.vllm_config
        return shortfalls(
            work,
            given,
            max_model_len=config.model_config.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            cached_tokens=self._cached_tokens(),
        )

    def _cached_tokens(self) -> int:
        cache = self._worker.vllm_config.cache_config
        return int((cache.num_gpu_blocks or 0) * cache.block_size)

    def memory_report(self) -> MemoryReport:
        """Say what the engine costs, by part."""
        return MemoryReport(
            shared_bytes=self.weights.nbytes,
            copied_bytes=0,
            padding_bytes=self.weights.padding_bytes,
            kv_bytes=0 if self.kv_released else self._kv_bytes,
            lora_bytes=self.adapter.nbytes if self.adapter is not None else 0,
            graph_bytes=self._graph_bytes(),
            kv_released=self.kv_released,
        )

    @property
    def released_bytes(self) -> int:
        """Bytes of the KV cache that are given up at the moment."""
        return self._kv_bytes if self.kv_released else 0

    def _graph_bytes(self) -> int:
        return int(getattr(self._worker, "graph_bytes", 0) or 0)  # a CPU worker captures none
