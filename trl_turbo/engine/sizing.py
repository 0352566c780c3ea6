"""How large an engine the work needs: sizes from the rollout, not from a share of the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_GIB = 1 << 30
_BLOCK = 16  # tokens in one block of vLLM's KV cache; every sequence leaves part of its last one empty
#: Tokens taken for a prompt where neither the script nor the trainer says how long prompts are.
PROMPT_GUESS = 512
#: The longest prompt that always fits, up to the model's own limit: a rollout of few short sequences must not make a
#: cache that refuses one long prompt, where TRL's would take it.
PROMPT_FLOOR = 8192
#: TRL's own value: the batch of a prefill, which bounds vLLM's activations.
MAX_BATCHED_TOKENS = 4096
#: A KV cache of this share of what torch holds may stand beside torch's cache.
LITTLE_CACHE = 0.02
#: One captured graph's own memory, and its share of the pool: 100 MiB for four of them over 28 layers (one H200).
GRAPH_BYTES = 25 << 20


@dataclass(frozen=True)
class Work:
    """One rollout.

    Attributes:
        sequences: Completions that are sampled at the same time.
        completion_tokens: Longest completion.
        prompt_tokens: Longest prompt, or `None` where it is not known.
    """

    sequences: int
    completion_tokens: int
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Plan:
    """What an engine is started with.

    Attributes:
        llm_kwargs: Arguments for `vllm.LLM`, without those the script set.
        kv_bytes: Size of the KV cache.
        token_bytes: Bytes that one token takes in it.
        wanted_bytes: What the work would fill; more than `kv_bytes` where memory is short, and vLLM queues the rest.
        notes: What the user should know, in sentences.
    """

    llm_kwargs: dict[str, Any]
    kv_bytes: int
    token_bytes: int
    wanted_bytes: int
    notes: tuple[str, ...] = field(default=())


def plan(
    config: Any,
    work: Work,
    given: dict[str, Any],
    *,
    itemsize: int,
    free_bytes: int | None = None,
    graphs: bool = False,
    adapter: bool = False,
) -> Plan:
    """Size an engine.

    Chunked prefill is not among what is set: vLLM has it on for every model that generates, since its v1 engine (its
    `EngineArgs` take `enable_chunked_prefill=None` for that, read in 0.12, 0.26 and 0.31), and warns where it is turned
    off. It is what lets a batch of `max_num_batched_tokens` be smaller than one sequence.

    Args:
        config: The transformers configuration of the model.
        work: The rollout.
        given: What the script passes to `LLM`; `None` counts as not given, and what is given wins.
        itemsize: Bytes of one element of the KV cache.
        free_bytes: Memory that is free on the device; `None` where that is not limited.
        graphs: Whether CUDA graphs are captured.
        adapter: Whether an adapter is served, so that each batch runs with it.

    Raises:
        ValueError: The work has no sequence or no token.
    """
    if work.sequences < 1 or work.completion_tokens < 1:
        raise ValueError(f"a rollout of {work.sequences} sequences of {work.completion_tokens} tokens samples nothing")
    text = config.get_text_config()
    token_bytes = kv_bytes_per_token(text, itemsize)
    longest = _longest(text, work, given)
    sequences = min(work.sequences, given.get("max_num_seqs") or work.sequences)
    tokens = sequences * (_up(longest, _BLOCK) + _BLOCK)
    if _stated(given) is None:
        tokens = max(tokens, _up(min(_limit(text), PROMPT_FLOOR + work.completion_tokens), _BLOCK) + 4 * _BLOCK)
    wanted = tokens * token_bytes
    wanted += wanted // 32  # vLLM keeps a null block, and groups layers of unlike attention in pages of one size
    least = (_up(longest, _BLOCK) + 4 * _BLOCK) * token_bytes
    kv = wanted
    notes: list[str] = []
    if free_bytes is not None:
        # What is free must hold the training step's activations too, unless the cache is given up by then.
        kv = min(wanted, max(least, int(0.8 * free_bytes)))
        if kv < wanted:
            notes.append(
                f"the KV cache is {kv / _GIB:.1f} GiB where the rollout would fill {wanted / _GIB:.1f}: vLLM queues "
                "part of it; lower per_device_train_batch_size or max_completion_length"
            )
    chosen: dict[str, Any] = {
        "kv_cache_memory_bytes": kv,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": max(MAX_BATCHED_TOKENS, sequences),
        "enable_prefix_caching": True,
        # The longest sequence that the cache holds: vLLM refuses a cache smaller than one of `max_model_len` tokens,
        # and a model's own limit, which TRL leaves in place, is often larger than all the work.
        "max_model_len": -1,
    }
    if graphs:
        chosen["compilation_config"] = graphs_of(sequences, adapter=adapter)
    kwargs = {name: value for name, value in chosen.items() if given.get(name) is None}
    return Plan(kwargs, given.get("kv_cache_memory_bytes") or kv, token_bytes, wanted, tuple(notes))


def graphs_of(sequences: int, *, adapter: bool) -> dict[str, Any]:
    """Whole-model graphs for the batches that decoding runs: no larger than the rollout, and each once.

    Not compiled: that starts in half the time (38 against 77 s on one H200, 1.5B), and steps took as long within what
    that host's processors let show (2.45 against 2.62 ms). Prefills are larger than any of these batches and would find
    no piecewise graph either.

    Args:
        sequences: The largest batch.
        adapter: Whether every batch runs with an adapter that is served.

    Returns:
        A compilation configuration for `vllm.LLM`.
    """
    sizes = sorted({1, 2, 4, *range(8, min(sequences, 512) + 1, 8), min(sequences, 512)})
    chosen: dict[str, Any] = {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [size for size in sizes if size <= sequences],
    }
    if adapter:
        chosen["cudagraph_specialize_lora"] = False  # no batch runs without the adapter: half the graphs
    return chosen


def longest(config: Any, plan: Plan, block: int | None = None) -> int:
    """The longest sequence that a plan's cache holds, up to the model's own limit.

    Args:
        config: The transformers configuration of the model.
        plan: Its sizes.
        block: Tokens of a block; `None` for vLLM's own.
    """
    block = block or _BLOCK
    whole = (plan.kv_bytes // plan.token_bytes // block - 1) * block  # one block is vLLM's own
    return min(_limit(config.get_text_config()), max(block, whole))


def shortfalls(
    work: Work, given: dict[str, Any], *, max_model_len: int, max_num_seqs: int, cached_tokens: int
) -> tuple[str, ...]:
    """Say where an engine that runs already is smaller than the work, in sentences.

    Args:
        work: The rollout.
        given: What the script passes to `LLM`.
        max_model_len: The longest sequence that the engine takes.
        max_num_seqs: How many it samples at the same time.
        cached_tokens: How many tokens its KV cache holds.
    """
    longest = _stated(given) or (work.prompt_tokens or 1) + work.completion_tokens
    sentences = []
    if longest > max_model_len:
        sentences.append(
            f"the engine that from_pretrained started takes sequences of up to {max_model_len} tokens and the trainer "
            f"asks for {longest}: longer ones are cut or refused; load the model with max_seq_length={longest}"
        )
    if work.sequences > max_num_seqs:
        sentences.append(
            f"the engine that from_pretrained started samples {max_num_seqs} sequences at a time and the trainer asks "
            f"for {work.sequences}: vLLM queues the rest; load the model with max_num_seqs={work.sequences}"
        )
    wanted = min(work.sequences, max_num_seqs) * min(longest, max_model_len)
    if wanted > cached_tokens:
        sentences.append(
            f"the KV cache of the engine that from_pretrained started holds {cached_tokens} tokens and the rollout "
            f"would fill {wanted}: vLLM queues part of it; load the model with a larger kv_cache_memory_bytes"
        )
    return tuple(sentences)


def kv_bytes_per_token(text_config: Any, itemsize: int) -> int:
    """Bytes of keys and values of one token over all layers; an upper bound where some layers slide a window."""
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return int(2 * text_config.num_hidden_layers * heads * head_dim * itemsize)


def _longest(text: Any, work: Work, given: dict[str, Any]) -> int:
    stated = _stated(given)
    if stated is not None:
        return stated
    prompt = work.prompt_tokens if work.prompt_tokens is not None else PROMPT_GUESS
    return min(_limit(text), prompt + work.completion_tokens)


def _stated(given: dict[str, Any]) -> int | None:
    """The longest sequence that the script set, if it did; vLLM's -1 leaves it open."""
    length = given.get("max_model_len") or -1
    return int(length) if length > 0 else None


def _limit(text: Any) -> int:
    return int(getattr(text, "max_position_embeddings", None) or 1 << 20)


def _up(tokens: int, block: int) -> int:
    return -(-tokens // block) * block
