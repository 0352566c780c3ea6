"""The CPU worker of a shared engine: vLLM's own, and bursts are run."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from trl_turbo.engine.burst import Executes

#: What `worker_cls` takes.
QUALNAME = f"{__name__}.SharedCPUWorker"


class SharedCPUWorker(Executes, CPUWorker):
    """Takes bursts, and is vLLM's in the rest."""
