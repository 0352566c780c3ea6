"""Sizes follow from the work; what the script set wins."""

from __future__ import annotations

import pytest
from transformers import Qwen2Config

from trl_turbo.engine.sizing import Work, longest, plan

CONFIG = Qwen2Config(
    hidden_size=1536,
    num_attention_heads=12,
    num_key_value_heads=2,
    num_hidden_layers=28,
    max_position_embeddings=32768,
)


def test_the_cache_holds_the_work_and_little_more():
    made = plan(CONFIG, Work(8, 4096, 128), {}, itemsize=2)
    assert made.token_bytes == 2 * 28 * 2 * 128 * 2
    need = 8 * (128 + 4096) * made.token_bytes
    assert need <= made.kv_bytes < 1.05 * need
    assert made.llm_kwargs["max_num_seqs"] == 8
    assert made.llm_kwargs["max_model_len"] == -1
    assert made.notes == ()


def test_a_long_prompt_fits_even_where_the_rollout_is_small():
    made = plan(CONFIG, Work(2, 64), {}, itemsize=2)
    assert made.kv_bytes >= (8192 + 64) * made.token_bytes
    short = plan(CONFIG, Work(2, 64, 64), {"max_model_len": 128}, itemsize=2)
    assert short.kv_bytes < 2 * 2 * 128 * made.token_bytes


def test_what_the_script_set_wins():
    given = {"max_num_seqs": 4, "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 28, "enable_prefix_caching": False}
    made = plan(CONFIG, Work(8, 4096, 128), {**given, "max_num_batched_tokens": None}, itemsize=2)
    assert not set(given) & set(made.llm_kwargs)
    assert made.llm_kwargs["max_num_batched_tokens"] == 4096
    assert made.kv_bytes == 1 << 28
    assert made.wanted_bytes < 1.1 * 4 * 1040 * made.token_bytes


def test_too_little_memory_is_said_and_one_sequence_always_fits():
    made = plan(CONFIG, Work(64, 8192, 512), {}, itemsize=2, free_bytes=2 << 30)
    assert made.kv_bytes < made.wanted_bytes
    assert "queues" in made.notes[0]
    tiny = plan(CONFIG, Work(64, 8192, 512), {}, itemsize=2, free_bytes=1 << 20)
    assert tiny.kv_bytes >= (8192 + 512) * tiny.token_bytes


def test_graphs_are_no_larger_than_the_rollout():
    made = plan(CONFIG, Work(12, 64), {}, itemsize=2, graphs=True, adapter=True)
    chosen = made.llm_kwargs["compilation_config"]
    assert chosen["cudagraph_capture_sizes"] == [1, 2, 4, 8, 12]
    assert chosen["cudagraph_specialize_lora"] is False
    large = plan(CONFIG, Work(1024, 64), {}, itemsize=2, graphs=True).llm_kwargs["compilation_config"]
    assert large["cudagraph_capture_sizes"][-1] == 512
    assert "compilation_config" not in plan(CONFIG, Work(12, 64), {}, itemsize=2).llm_kwargs


def test_the_longest_sequence_of_a_cache():
    made = plan(CONFIG, Work(4, 1000, 24), {"max_model_len": 1024}, itemsize=2)
    assert 1024 <= longest(CONFIG, made) < 5 * 1024
    assert longest(CONFIG, made, 128) % 128 == 0
    large = plan(CONFIG, Work(64, 4096, 4096), {}, itemsize=2)
    assert longest(CONFIG, large) == 32768  # the model's own limit
    tight = plan(CONFIG, Work(64, 8192, 512), {}, itemsize=2, free_bytes=1 << 20)
    assert 8192 + 512 <= longest(CONFIG, tight) < 9000


@pytest.mark.parametrize("work", [Work(0, 8), Work(4, 0)])
def test_work_without_tokens_is_refused(work):
    with pytest.raises(ValueError, match="samples nothing"):
        plan(CONFIG, work, {}, itemsize=2)
