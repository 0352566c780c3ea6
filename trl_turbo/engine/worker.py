"""The GPU workers of our engines: vLLM's own, save that bursts are run and graphs capture kernels of ours.

That of an engine which reads the trainer's weights also gives up the KV cache alone when it sleeps.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.device_allocator.cumem import CuMemAllocator, unmap_and_release
from vllm.v1.worker.gpu_worker import Worker

from trl_turbo.engine import abilities, decode
from trl_turbo.engine.burst import Executes
from trl_turbo.engine.together import StartsTogether
from trl_turbo.report import note
from trl_turbo.settings import setting


class BurstWorker(Executes, Worker):
    """Takes bursts, and lets CUDA graphs capture our kernels for few sequences."""

    graph_bytes = 0
    kernels: decode.DecodeKernels | None = None
    _lean: Any = None
    _lean_asked = False

    def lean_steps(self) -> Any:
        """Settled at the first burst, when the graphs are there."""
        if not self._lean_asked:
            self._lean_asked = True
            reason = self._take_lean_steps()
            if reason is not None:
                note("rollout", f"every token is prepared anew, which is slower: {reason}")
        return self._lean

    def _take_lean_steps(self) -> str | None:
        """Take them, or say why not."""
        try:  # from vLLM 0.13 on
            from trl_turbo.engine.lean import LeanSteps, unfit
        except ImportError as error:
            return str(error)
        reason = unfit(self.model_runner)
        if reason is None:
            self._lean = LeanSteps(self.model_runner, self.kernels.own_attention if self.kernels is not None else set())
        return reason

    def init_device(self) -> None:
        """As vLLM's; graphs go into a pool of this engine's own."""
        abilities.forget_graph_pool()
        super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's; CUDA graphs capture our kernels for few sequences, and what they cost is kept."""
        capture = self.model_runner.capture_model

        def measured() -> int:
            with self._our_kernels():
                self.graph_bytes = capture()
            return self.graph_bytes

        self.model_runner.capture_model = measured
        try:
            return super().compile_or_warm_up_model()
        finally:
            del self.model_runner.capture_model

    def _our_kernels(self) -> AbstractContextManager[object]:
        if setting("rollout_kernels") == "off":
            return nullcontext()
        if self.vllm_config.compilation_config.mode:
            note("rollout", "decode steps run vLLM's kernels alone, because the script has vLLM compile the model")
            return nullcontext()
        length = self.vllm_config.model_config.max_model_len // 2
        self.kernels = decode.DecodeKernels(self.model_runner.model, length)
        for sentence in self.kernels.declined:
            note("rollout", sentence)
        return self.kernels.captured()


class SharedWorker(StartsTogether, BurstWorker):
    """Keeps the weights out of the pool that sleep mode empties.

    vLLM puts all that `load_model` allocates into the pool `weights`, which level 1 copies to the host and level 2
    throws away. Here those are the tensors that sharing joins, which the trainer updates, and vLLM's adapter buffers,
    whose addresses graphs hold. vLLM 0.26 has no level that leaves them; can go when 0.31, which has
    `release_kv_cache_memory()`, is the oldest supported.
    """

    def sleep(self, level: int = 1) -> None:  # noqa: ARG002 (whatever the level, the cache alone is given up)
        """Give the KV cache's memory back to the driver.

        vLLM's own way also collects all garbage and empties torch's cache, which the training step then fills anew:
        both would be waited for after each rollout.
        """
        torch.cuda.synchronize()
        for data in CuMemAllocator.get_instance().pointer_to_data.values():
            if not getattr(data, "is_asleep", False):
                unmap_and_release(data.handle)
                if hasattr(data, "is_asleep"):  # from 0.26 on; without it `wake_up` maps all
                    data.is_asleep = True

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[object]:
        if tag == "weights":
            return nullcontext()
        return super()._maybe_get_memory_pool_context(tag)


#: What `worker_cls` takes, for an engine that reads the trainer's weights and for one with its own.
SHARED = f"{__name__}.{SharedWorker.__name__}"
OWN = f"{__name__}.{BurstWorker.__name__}"
