"""What settings come to in an engine, and what the report says of it."""

from __future__ import annotations

import pytest
import torch

from tests.engine.models import saved
from trl_turbo.engine import options


@pytest.mark.parametrize(
    ("asked", "dtype", "merged", "why"),
    [
        (None, torch.bfloat16, True, "on a 16-bit base that samples faster"),
        (None, torch.float32, False, "the base is float32"),
        ("served", torch.bfloat16, False, "as rollout_adapter='served' asks"),
        ("merged", torch.float32, True, "as rollout_adapter='merged' asks"),
    ],
)
def test_how_an_adapter_is_used_and_why(asked, dtype, merged, why, monkeypatch):
    monkeypatch.delenv("TRL_TURBO_ROLLOUT_ADAPTER", raising=False)
    if asked:
        monkeypatch.setenv("TRL_TURBO_ROLLOUT_ADAPTER", asked)
    found, sentence = options.merges(dtype)
    assert found == merged
    assert ("folded into the base" if merged else "served unmerged") in sentence
    assert why in sentence


def test_a_quantised_base_is_never_folded_into(monkeypatch):
    from trl_turbo.engine.errors import EngineDeclinedError

    monkeypatch.delenv("TRL_TURBO_ROLLOUT_ADAPTER", raising=False)
    found, sentence = options.merges(torch.bfloat16, quantised=True)
    assert not found
    assert "quantised anew for each rollout" in sentence
    monkeypatch.setenv("TRL_TURBO_ROLLOUT_ADAPTER", "merged")
    with pytest.raises(EngineDeclinedError, match="set auto or served"):
        options.merges(torch.bfloat16, quantised=True)


def test_the_dtype_of_the_cache(monkeypatch):
    monkeypatch.delenv("TRL_TURBO_ROLLOUT_KV_CACHE_DTYPE", raising=False)
    assert options.kv_cache(torch.bfloat16, {}) == ({}, 2)
    monkeypatch.setenv("TRL_TURBO_ROLLOUT_KV_CACHE_DTYPE", "fp8")
    assert options.kv_cache(torch.bfloat16, {}) == ({"kv_cache_dtype": "fp8"}, 1)
    assert options.kv_cache(torch.bfloat16, {"kv_cache_dtype": "bfloat16"}) == ({}, 2)  # the script's own wins
    given = {"kv_cache_dtype": "fp8_e5m2"}
    assert options.kv_cache(torch.bfloat16, given) == (given, 1)
    assert options.cache_note(None, "bfloat16", 0.01) == ""
    assert "slightly different policy than the one that is trained, by 0.012 a token" in options.cache_note(
        "fp8", "bfloat16", 0.0123
    )


@pytest.mark.vllm
def test_an_fp8_cache_is_half_as_large_or_declined_in_words(tmp_path, turbo):
    import trl_turbo
    from trl_turbo.engine.errors import EngineDeclinedError
    from trl_turbo.engine.serving import alone
    from trl_turbo.engine.sizing import Work, plan

    report = trl_turbo.patch(logprob=False, rollout=True, rollout_kv_cache_dtype="fp8", verbose=False)
    model, _ = saved(tmp_path, "qwen2_tied", dtype=torch.bfloat16, initializer_range=0.02)
    try:
        with alone():
            if not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
                with pytest.raises(EngineDeclinedError, match="FP8 KV cache on CPU"):
                    turbo(model)
                return
            llm = turbo(model)
        assert llm.llm_engine.vllm_config.cache_config.cache_dtype == "fp8"
        whole = plan(model.config, Work(4, 16, 32), {"max_num_seqs": 4}, itemsize=2).kv_bytes
        assert 2 * llm.memory_report().kv_bytes == pytest.approx(whole, rel=0.01)
        assert any("the KV cache is fp8" in note.text for note in report.notes)
    finally:
        trl_turbo.unpatch()
