"""What an installed vLLM has of what the engine uses, by looking: TRL 0.29.1 takes 0.10.2 to 0.12, TRL 1.16 up to 0.31.

What a vLLM lacks is left out where the engine runs without it; where it does not, the engine is declined. What all keep
for the process, and an engine must have for itself, is here too.
"""

from __future__ import annotations

from typing import Any


def fits_length() -> bool:
    """Whether `max_model_len=-1` means the longest sequence that the cache holds; from 0.14 on."""
    from vllm.v1.core import kv_cache_utils

    return hasattr(kv_cache_utils, "_auto_fit_max_model_len")


def unburstable() -> str | None:
    """Say why this vLLM's scheduler hands out no bursts, or return `None`; from 0.26 on it keeps what they need."""
    try:
        from vllm.v1.request import Request
        from vllm.v1.worker.gpu_worker import Worker

        import trl_turbo.engine.burst  # noqa: F401
    except ImportError as error:
        return str(error)
    kept = set(Request.__init__.__code__.co_names) | set(dir(Request))
    missing = [
        name for name in ("num_output_placeholders", "num_in_flight_tokens", "is_prefill_chunk") if name not in kept
    ]
    if missing:
        return f"its requests have no {missing[0]}"
    return None if hasattr(Worker, "sample_tokens") else "its worker has no sample_tokens"


def compilation(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a compilation configuration that this vLLM knows; `mode` was called `level` before 0.12."""
    from vllm.config import CompilationConfig

    known = set(CompilationConfig.__dataclass_fields__)
    renamed = {"level" if name == "mode" and name not in known else name: value for name, value in config.items()}
    return {name: value for name, value in renamed.items() if name in known}


def forget_graph_pool() -> None:
    """Let the next engine's graphs go into a pool of its own; vLLM keeps one for the process.

    Where its graphs are gone, and where tensors of an engine that is gone still lie in it, such as those that a
    notebook's output shows, torch refuses to capture into it again (seen with torch 2.11: the assertion `use_count > 0`
    of its allocator), and the process can capture no graph any more.
    """
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    if hasattr(platform, "_global_graph_pool"):
        platform._global_graph_pool = None
