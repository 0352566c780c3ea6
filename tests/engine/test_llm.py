"""`TurboLLM` around a shared engine: what TRL's calls do to it, and what they must not do."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from tests.engine.greedy import PROMPTS, by_transformers, by_vllm, train
from tests.engine.models import saved

pytestmark = pytest.mark.vllm


def test_trls_calls_of_every_version_are_harmless(tmp_path, turbo, monkeypatch):
    import vllm

    model, _ = saved(tmp_path, "qwen2_tied")
    llm = turbo(model, enable_sleep_mode=True)
    assert isinstance(llm, vllm.LLM)
    assert llm.shared is not None, llm.declined
    train(model)
    expected = by_transformers(model)
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.refresh()
    assert llm.collective_rpc("reload_weights") == [None]  # stock, this loads the first checkpoint over the weights
    llm.wake_up(tags=["kv_cache"])
    assert by_vllm(llm) == expected == by_transformers(model)
    llm.sleep(level=1)
    llm.wake_up()
    assert by_vllm(llm) == expected
    assert len(llm.collective_rpc("check_health")) == 1

    monkeypatch.setattr(vllm.LLM, "reset_prefix_cache", lambda self: False)
    with pytest.raises(RuntimeError, match="requests are still running"):
        llm.refresh()  # an old prefix must never go unnoticed


def test_control_the_stock_call_of_a_sync_brings_the_first_checkpoint_back(tmp_path, turbo, monkeypatch):
    """What `reload_weights` does where it is let through: to vLLM's own class after a sync, and to a shared engine."""
    import torch
    import vllm
    from vllm.model_executor.layers import utils

    from tests.engine.conftest import shut_down, trl_arguments

    # On processors with AVX-512 vLLM's CPU build packs weights, into which no sync can load
    linear = torch.nn.functional.linear
    plain = lambda layer, remove_weight: setattr(layer, "cpu_linear", linear)  # noqa: E731
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", plain)
    model, _ = saved(tmp_path, "qwen2_tied")
    first = by_transformers(model)
    stock = vllm.LLM(
        **{**trl_arguments(model), "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 24}
    )
    train(model)
    trained = by_transformers(model)
    stock.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(model.named_parameters())
    stock.reset_prefix_cache()
    assert by_vllm(stock) == trained != first
    stock.collective_rpc("reload_weights")
    stock.reset_prefix_cache()
    assert by_vllm(stock) == first
    shut_down(stock)
    del stock

    llm = turbo(model)
    assert llm.shared is not None, llm.declined
    # Our loader has nothing to reload from, and vLLM 0.31 knows of none
    with pytest.raises((AttributeError, NotImplementedError), match=r"_construction|trl_turbo_shared"):
        vllm.LLM.collective_rpc(llm, "reload_weights")
    assert llm.collective_rpc("reload_weights") == [None]
    assert by_vllm(llm) == trained


def test_the_cache_is_given_up_once_and_comes_back_before_it_is_used(tmp_path, turbo, monkeypatch):
    import vllm

    calls = []
    monkeypatch.setattr(vllm.LLM, "sleep", lambda self, level: calls.append(f"sleep {level}"))
    monkeypatch.setattr(vllm.LLM, "wake_up", lambda self, tags=None: calls.append("wake"))
    llm = turbo(saved(tmp_path, "qwen2_tied")[0])
    llm.release()
    assert calls == []  # nothing to give up on a CPU
    llm.shared.can_release = True
    kv_bytes = llm.memory_report().kv_bytes
    assert kv_bytes > 0
    llm.release()
    llm.sleep(level=2)
    assert calls == ["sleep 1"]  # never level 2: the weights are the trainer's
    assert llm.memory_report().kv_bytes == 0
    llm.wake_up(tags=["weights"])
    llm.refresh()
    assert calls == ["sleep 1"]
    by_vllm(llm, PROMPTS[:1], 2)
    assert calls == ["sleep 1", "wake"]
    assert llm.memory_report().kv_bytes == kv_bytes


def test_text_is_left_out_only_where_nobody_reads_it(tmp_path, turbo):
    from vllm import SamplingParams

    llm = turbo(saved(tmp_path, "qwen2_tied")[0])
    prompts = [{"prompt_token_ids": [5, 6, 7]}]

    def sample(**settings):
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, **settings)
        output = llm.generate(prompts, params, use_tqdm=False)[0].outputs[0]
        assert params.detokenize  # the caller's own object is left alone
        return output

    told = sample()
    assert told.text
    with llm.ids_only():
        silent = sample()
        stopped = sample(stop=[told.text[2]])
    assert silent.text == ""
    assert list(silent.token_ids) == list(told.token_ids)
    assert len(stopped.token_ids) < 8  # stop strings need the text, and still work
    assert sample().text == told.text


def test_outside_a_trainer_it_is_vllms_own_class(tmp_path, monkeypatch):
    from tests.engine.conftest import shut_down
    from trl_turbo.engine.llm import TurboLLM

    model, folder = saved(tmp_path, "qwen2_tied")
    llm = TurboLLM(folder, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 24, max_num_seqs=4)
    assert llm.shared is None
    assert llm.declined == ""
    assert by_vllm(llm) == by_transformers(model)
    with pytest.raises(RuntimeError, match="it was not built by a trainer"):
        llm.memory_report()
    llm.refresh()  # nothing to do
    shut_down(llm)


def test_a_rollout_larger_than_the_cache_is_queued(tmp_path, turbo):
    model, _ = saved(tmp_path, "qwen2_tied")
    # Two blocks of 128 tokens and vLLM's own one: at most two sequences at a time
    llm = turbo(model, kv_cache_memory_bytes=3 * 128 * 2 * 2 * 2 * 32 * 4)
    assert llm.shared is not None, llm.declined
    many = [list(p) for p in PROMPTS] * 4
    assert by_vllm(llm, many) == by_transformers(model) * 4


def test_what_the_trainer_tells_is_taken_by_one_engine():
    from trl_turbo.engine.serving import serving, take

    with serving(lambda: "trainee"):
        assert take() == "trainee"
        assert take() is None
    assert take() is None


def test_the_gpu_worker_keeps_the_weights_out_of_the_pool():
    from vllm.v1.worker.gpu_worker import Worker

    from trl_turbo.engine.worker import SHARED, SharedWorker

    assert SHARED == "trl_turbo.engine.worker.SharedWorker"
    assert callable(Worker._maybe_get_memory_pool_context)  # what it overrides
    worker = object.__new__(SharedWorker)
    assert isinstance(worker._maybe_get_memory_pool_context("weights"), nullcontext)
