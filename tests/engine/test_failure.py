"""What is said of an engine that did not start: the largest parts, and the setting that makes them smaller."""

from __future__ import annotations

import pytest
import torch

from trl_turbo.engine.failure import sentence

GIB = 1 << 30
SIZES = {"KV cache": 3 * GIB, "shared weights": 6 * GIB, "CUDA graphs": 25 << 20, "adapter buffers": 0}

#: As vLLM 0.12, 0.26, 0.27 and 0.31 raise them, their advice cut short.
TOO_LONG = (
    "To serve at least one request with the model's max seq len (4096), (2.0 GiB KV cache is needed, which is larger "
    "than the available KV cache memory (1.5 GiB). Based on the available memory, the estimated maximum model length "
    "is 3072. Try increasing `gpu_memory_utilization`."
)
NOTHING_LEFT = (
    "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine."
)
NO_TOKEN = (
    "Cannot auto-fit max_model_len: not enough GPU memory available to serve even a single token. Try increasing "
    "`gpu_memory_utilization`."
)
OCCUPIED = (
    "Free memory on device cuda:0 (20.1/79.1 GiB) on startup is less than desired GPU memory utilization (0.9, 71.2 "
    "GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
WARM_UP = (
    "CUDA out of memory occurred when warming up sampler with 256 dummy requests. Please try lowering `max_num_seqs`."
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(WARM_UP),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9999999 bytes"),
        MemoryError(),
    ],
)
def test_the_largest_parts_come_first_and_the_setting_is_of_the_largest(error):
    said = sentence(error, SIZES, trainer=True)
    assert said == (
        "vLLM ran out of memory at start, and its largest parts are shared weights 6.0 GiB, KV cache 3.0 GiB, CUDA "
        "graphs 25 MiB; lower per_device_train_batch_size, max_completion_length or vllm_max_model_length"
    )


@pytest.mark.parametrize(
    ("part", "of_trainer", "of_from_pretrained"),
    [
        ("KV cache", "vllm_max_model_length", "max_seq_length or kv_cache_memory_bytes"),
        ("CUDA graphs", "lower per_device_train_batch_size", "enforce_eager=True"),
        ("adapter buffers", "lower the adapter's r", "lower max_lora_rank"),
    ],
)
def test_each_part_has_a_setting(part, of_trainer, of_from_pretrained):
    sizes = {**SIZES, part: 5 * GIB}
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert sentence(error, sizes, trainer=True).endswith(of_trainer)
    assert sentence(error, sizes, trainer=False).endswith(of_from_pretrained)
    assert f"{part} 5.0 GiB" in sentence(error, sizes, trainer=True)


@pytest.mark.parametrize(
    ("text", "found", "settings"),
    [
        (TOO_LONG, "2.0 GiB KV cache is needed", {"cache_given": True}),
        (NOTHING_LEFT, "No available memory for the cache blocks", {"trainer": False}),
        (NO_TOKEN, "Cannot auto-fit max_model_len", {"trainer": False}),
    ],
)
def test_a_cache_that_is_too_small(text, found, settings):
    said = sentence(ValueError(text), {**SIZES, "KV cache": 0}, **{"trainer": True, **settings})
    assert said.startswith("vLLM's KV cache is too small at start (")
    assert found in said
    assert "Try" not in said  # vLLM's advice is about arguments of its own
    wanted = "raise kv_cache_memory_bytes" if settings.get("cache_given") else "raise gpu_memory_utilization"
    assert wanted in said
    assert sentence(ValueError(TOO_LONG), SIZES, trainer=True).endswith("lower vllm_max_model_length")


def test_memory_that_somebody_else_has():
    said = sentence(ValueError(OCCUPIED), SIZES, trainer=True)
    assert "20.1/79.1 GiB" in said
    assert said.endswith("end what else runs on the device or lower vllm_gpu_memory_utilization")


@pytest.mark.parametrize("error", [ValueError("rope_scaling is wrong"), RuntimeError("planted")])
def test_other_errors_are_told_as_they_are(error):
    said = sentence(error, SIZES, trainer=True)
    assert said == f"vLLM did not start on the trainer's weights ({type(error).__name__}: {error})"


@pytest.mark.vllm
def test_an_engine_that_runs_out_of_memory_names_its_own_parts(tmp_path, turbo, monkeypatch):
    """The sizes are those of the engine: what it has once it runs, it would have named."""
    peft = pytest.importorskip("peft")

    from tests.engine.models import saved
    from trl_turbo.engine import llm as module

    config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(saved(tmp_path, "qwen2_tied")[0], config)
    starts = []
    finish = module.TurboLLM._finish
    monkeypatch.setattr(module.TurboLLM, "_finish", lambda self, start: starts.append(start) or finish(self, start))
    llm = turbo(model)
    assert llm.shared is not None, llm.declined
    report, sizes = llm.memory_report(), starts[0].sizes()
    assert sizes["KV cache"] == report.kv_bytes
    assert sizes["shared weights"] == report.shared_bytes
    assert sizes["adapter buffers"] == report.lora_bytes
    assert sizes["CUDA graphs"] == report.graph_bytes == 0
    said = starts[0].failure(torch.OutOfMemoryError("out of memory"))
    assert all(part in said for part in ("KV cache", "shared weights", "adapter buffers"))
