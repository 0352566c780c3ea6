"""The CPU worker of a shared engine: vLLM's own, and bursts are run."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from trl_turbo.engine.burst import Executes
from trl_turbo.engine.together import StartsTogether

#: What `worker_cls` takes.
QUALNAME = f"{__name__}.SharedCPUWorker"


class SharedCPUWorker(StartsTogether, Executes, CPUWorker):
    """Takes bursts, starts with those of other ranks, and is vLLM's in the rest."""
