"""What the GPU tests of the engine look at."""

from __future__ import annotations

from typing import Any


def graphs(llm: Any) -> int:
    """How many graphs vLLM captured; their memory may be too little for the driver to report."""
    return len(llm.llm_engine.model_executor.driver_worker.model_runner.cudagraph_manager.graphs)
