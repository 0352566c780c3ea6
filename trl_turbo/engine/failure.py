"""What is said of an engine that did not start: where memory went, and which setting makes it less."""

from __future__ import annotations

from collections.abc import Mapping

import torch

_GIB = 1 << 30
#: How vLLM 0.12 to 0.31 and torch say that memory is short; other errors of theirs are of these classes too.
_SHORT = (
    "out of memory",
    "can't allocate memory",
    "not enough GPU memory",
    "No available memory for the cache blocks",
    "which is larger than the available KV cache memory",
)
#: How vLLM says that somebody else has the device's memory.
_OCCUPIED = ("is less than desired",)

#: Parts that an engine adds to a training, and the setting that makes each smaller: of a trainer, of `from_pretrained`.
CACHE, GRAPHS, ADAPTER, WEIGHTS = "KV cache", "CUDA graphs", "adapter buffers", "shared weights"
_LOWER = {
    CACHE: (
        "lower per_device_train_batch_size, max_completion_length or vllm_max_model_length",
        "lower max_num_seqs, max_seq_length or kv_cache_memory_bytes",
    ),
    GRAPHS: ("lower per_device_train_batch_size", "lower max_num_seqs or pass enforce_eager=True"),
    ADAPTER: ("lower the adapter's r", "lower max_lora_rank"),
}


def sentence(error: Exception, sizes: Mapping[str, int], *, trainer: bool, cache_given: bool = False) -> str:
    """Say that vLLM did not start, and where memory went if it ran out.

    Args:
        error: What it raised.
        sizes: Bytes by part, as far as they are known; the names are those above.
        trainer: Whether a trainer of TRL's starts the engine, and not `from_pretrained`.
        cache_given: Whether the script set the KV cache's size.
    """
    text = str(error)
    if any(words in text for words in _OCCUPIED):
        return (
            f"vLLM found too little free memory at start ({_first(text)}); end what else runs on the device or lower "
            f"{'vllm_gpu_memory_utilization' if trainer else 'gpu_memory_utilization'}"
        )
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(words in text for words in _SHORT):
        return f"vLLM did not start on the trainer's weights ({type(error).__name__}: {error})"
    if isinstance(error, ValueError):  # the cache is smaller than one sequence, or there is no room for any
        return f"vLLM's KV cache is too small at start ({_first(text)}); {_larger(sizes, trainer, cache_given)}"
    known = {part: size for part, size in sizes.items() if size > 0}
    parts = sorted(known, key=lambda part: -known[part])
    said = ", ".join(f"{part} {_size(known[part])}" for part in parts)
    # The weights are there with or without an engine
    largest = next((part for part in parts if part in _LOWER), CACHE)
    return f"vLLM ran out of memory at start, and its largest parts are {said}; {_LOWER[largest][not trainer]}"


def unprepared(error: Exception, version: str) -> str:
    """Say that what the engine is built from is not as expected in this vLLM.

    Args:
        error: What was raised.
        version: vLLM's.
    """
    return (
        f"the engine cannot be built with vLLM {version} ({type(error).__name__}: {error}); install the newest vLLM "
        "that this TRL supports to share the weights"
    )


def _larger(sizes: Mapping[str, int], trainer: bool, given: bool) -> str:
    if given:
        return "raise kv_cache_memory_bytes or lower max_model_len"
    if not sizes.get(CACHE):
        return "raise gpu_memory_utilization or lower max_seq_length"
    return "lower vllm_max_model_length" if trainer else "lower max_seq_length"


def _first(text: str) -> str:
    """The first sentence: vLLM's advice after it is about arguments that a script may not have."""
    return text.split(". ")[0].strip().rstrip(".")


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB // 10 else f"{count / (1 << 20):.3g} MiB"
