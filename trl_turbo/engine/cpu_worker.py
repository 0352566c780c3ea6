"""The CPU workers of our engines: vLLM's own, and bursts are run."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from trl_turbo.engine.burst import Executes
from trl_turbo.engine.together import StartsTogether


class BurstCPUWorker(Executes, CPUWorker):
    """Takes bursts, and is vLLM's in the rest."""


class SharedCPUWorker(StartsTogether, BurstCPUWorker):
    """Starts with those of other ranks, too."""


#: What `worker_cls` takes, for an engine that reads the trainer's weights and for one with its own.
SHARED = f"{__name__}.{SharedCPUWorker.__name__}"
OWN = f"{__name__}.{BurstCPUWorker.__name__}"
