"""`from_pretrained`: a model and its tokenizer, with vLLM over the same weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any


def from_pretrained(
    name: str,
    *,
    fast_inference: bool = False,
    load_in_4bit: bool = False,
    max_lora_rank: int = 64,
    max_seq_length: int | None = None,
    max_num_seqs: int | None = None,
    dtype: Any = None,
    kv_cache_memory_bytes: int | None = None,
    gpu_memory_utilization: float | None = None,
    vllm_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer; the model can sample with vLLM, from one copy of the weights.

    The model is what ``AutoModelForCausalLM.from_pretrained`` returns, with one method more:
    ``model.fast_generate(prompts, sampling_params=None)`` returns vLLM's outputs, sampled from the weights and the LoRA
    adapter that the model has when it is called. Prompts are texts, chats or token ids. The GRPO, RLOO and OnlineDPO
    trainers of a patched TRL sample from the same engine.

    Args:
        name: Name on the Hub, or a folder.
        fast_inference: Let vLLM read the checkpoint at once, and point the model at vLLM's tensors: the lowest peak.
            Without it transformers loads the model, and the first call of ``fast_generate`` starts vLLM over it.
        load_in_4bit: Quantise to nf4 with double quantisation while loading, through bitsandbytes.
        max_lora_rank: Make room for an adapter of up to this rank in vLLM; 0 for none.
        max_seq_length: Longest prompt and completion together; ``None`` takes the longest that the KV cache holds.
        max_num_seqs: Sequences that are sampled at the same time; vLLM queues what is beyond. 64 by default.
        dtype: Of the weights; ``None`` is that of the checkpoint.
        kv_cache_memory_bytes: Size of the KV cache; ``None`` computes it from the two sizes above and what is free.
        gpu_memory_utilization: Let vLLM take this share of the device instead; with ``fast_inference=True`` alone.
        vllm_kwargs: Further arguments of ``vllm.LLM``.
        **kwargs: Arguments of transformers' ``from_pretrained``; with ``fast_inference=True`` those that say where the
            checkpoint is, and ``attn_implementation``.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ImportError: ``fast_inference=True`` without vLLM.
        TypeError: An argument that vLLM's loading has no use for.
        EngineDeclinedError: With ``fast_inference=True``, a model that cannot be served from one copy of its weights.
    """
    if fast_inference and importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "fast_inference=True needs vLLM, which is not installed; pip install 'trl-turbo[vllm]', or set "
            "fast_inference=False"
        )
    settled = sorted({"model", "dtype", "load_format", "quantization"} & set(vllm_kwargs or {}))
    if settled:
        raise TypeError(f"vllm_kwargs has {settled[0]}, which follows from the other arguments; leave it out")
    if gpu_memory_utilization is not None and (load_in_4bit or not fast_inference):
        raise TypeError(
            "gpu_memory_utilization sizes an engine that loads the weights itself, which it does with "
            "fast_inference=True and 16-bit weights; pass kv_cache_memory_bytes"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_turbo.engine.fast_generate import FastGenerate
    from trl_turbo.engine.pretrained import Engine, source_kwargs, without_values

    name = str(name)  # a Path too
    engine = Engine(
        name,
        max_lora_rank,
        {
            **source_kwargs(kwargs),
            "max_model_len": max_seq_length,
            "max_num_seqs": max_num_seqs,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "gpu_memory_utilization": gpu_memory_utilization,
            **(vllm_kwargs or {}),
        },
    )
    dtype = "auto" if dtype is None else dtype
    empty = fast_inference and not load_in_4bit
    if empty:
        model = without_values(name, dtype, kwargs)
    else:
        if load_in_4bit:
            kwargs["quantization_config"] = _nf4(dtype)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(name, **{key: kwargs[key] for key in _TOKENIZER if key in kwargs})
    model.fast_generate = FastGenerate(model, tokenizer, engine)
    if fast_inference:
        engine.start(model, empty=empty)
    return model, tokenizer


_TOKENIZER = (
    "revision",
    "code_revision",
    "trust_remote_code",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "proxies",
    "subfolder",
)


def _nf4(dtype: Any) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
    )
