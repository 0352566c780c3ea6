from __future__ import annotations

import gc
import importlib.util
import os
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None

# Read when vLLM is imported: one process, a small cache.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("vllm") is not None and not HAS_VLLM:
            item.add_marker(pytest.mark.skip(reason="vllm is not importable: `tox run -e vllm` has it"))


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    """What people see is the business of tests/people; other tests of this process see it still."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRL_TURBO_DASHBOARD", "TRL_TURBO_GUARDS"):
            patch.setenv(name, os.environ.get(name, "0"))
        yield


@pytest.fixture(autouse=True)
def _collected():
    yield
    gc.collect()
    if not gc.get_freeze_count():  # by the end of an engine: vLLM thaws what `_quick_collections` froze, and its own
        gc.freeze()


def free_port() -> int:
    """Not a fixed one: another run on this machine may hold it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def alone(patch: pytest.MonkeyPatch) -> None:
    """Undo what TRL sets for vLLM and leaves: the next trainer would take itself for a distributed one.

    TRL looks for a free port too, among four at first, where two runs at the same time find the same one.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        patch.setenv(name, "")  # remembers what was there, and puts it back
        patch.delenv(name)
    patch.setattr("trl.trainer.utils._find_free_port", free_port, raising=False)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)


@pytest.fixture
def turbo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts engines as TRL does: `turbo(model, **kwargs)`."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))

    started = []

    def start(model, *, work=None, **kwargs):
        import torch

        from trl_turbo.engine.llm import TurboLLM
        from trl_turbo.engine.serving import Trainee, alone, serving
        from trl_turbo.engine.sizing import Work

        # On a GPU an engine that is declined says why, where one with a copy of the weights would first take a minute
        way = alone() if torch.cuda.is_available() else nullcontext()
        with way, serving(lambda: Trainee(model, None, work or Work(4, 16, 32))):
            started.append(TurboLLM(**{**trl_arguments(model), **kwargs}))
        return started[-1]

    yield start
    for llm in started:
        shut_down(llm)


def shut_down(llm) -> None:
    """End an engine now: one that is collected while the next starts takes that one's process groups with it."""
    if not vars(llm).get("is_shut_down", False):
        llm.is_shut_down = True
        llm.llm_engine.engine_core.shutdown()


def trl_arguments(model) -> dict[str, object]:
    """What TRL 1.16 passes to `LLM`."""
    return {
        "model": model.name_or_path,
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.3,
        "max_model_len": None,
        "max_num_seqs": 4,
        "enable_sleep_mode": False,
        "model_impl": "vllm",
        "distributed_executor_backend": "external_launcher",
        "seed": 0,
        "max_num_batched_tokens": 4096,
        "logprobs_mode": "processed_logprobs",
        "quantization": None,
        "trust_remote_code": False,
    }
