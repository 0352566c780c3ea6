"""A running engine that reads the trainer's weights: what it shares, serves and costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trl_turbo.engine import parity
from trl_turbo.engine.adapter import ServedAdapter
from trl_turbo.engine.adapter_config import adapter_layers
from trl_turbo.engine.four_bit import FOUR_BIT_DTYPE
from trl_turbo.engine.memory import MemoryReport
from trl_turbo.engine.merged import Fold, LogTooLargeError
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
        can_release: Whether the KV cache can be given up between rollouts.
        kv_released: Whether it is given up at the moment.
    """

    def __init__(self, start: Start, worker: Any) -> None:
        self._model = start.trainee.model
        self._worker = worker
        self._quantised = start.quantised
        self._kv_bytes = start.plan.kv_bytes
        self.weights = start.weights
        self.can_release = start.can_release
        self.kv_released = False
        self.adapter: ServedAdapter | None = None
        self.fold: Fold | None = None
        if start.serves_adapter:
            self.adapter = ServedAdapter(self._model, worker.model_runner.lora_manager)
            self.adapter.push()
            if start.merges_adapter:
                self.fold = Fold(adapter_layers(self._model, self.adapter.name), self.adapter.name)

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
        if self.adapter is not None and self.fold is None:
            self.adapter.push()

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

    def _graph_bytes(self) -> int:
        return int(getattr(self._worker, "graph_bytes", 0) or 0)  # a CPU worker captures none
