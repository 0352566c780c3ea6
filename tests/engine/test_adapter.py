"""A PEFT adapter in vLLM's buffers: served after each push, stale without one, declined where vLLM has no place for it."""

from __future__ import annotations

import pytest
import torch

from tests.engine.greedy import PROMPTS, by_transformers, by_vllm, train
from tests.engine.models import make, saved

pytest.importorskip("peft")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "all linears": {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    "a subset": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "rank-stabilised": {"r": 16, "lora_alpha": 24, "use_rslora": True, "target_modules": ["k_proj", "up_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 12, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"q_proj": 6},
        "target_modules": ["q_proj", "up_proj", "o_proj"],
    },
}


def with_adapter(model, **config):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=True, **config))


@pytest.mark.vllm
def test_an_adapter_is_served_as_it_is_trained(tmp_path, turbo, subtests):
    for name, config in CASES.items():
        with subtests.test(name):
            model, _ = saved(tmp_path / name, "qwen2_tied")
            frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
            model = with_adapter(model, lora_dropout=0.0, **config)
            expected = by_transformers(model)
            llm = turbo(model)
            assert llm.shared is not None, llm.declined
            assert len(llm.shared.weights) == len(frozen)
            assert by_vllm(llm) == expected

            train(model, steps=3, lr=0.05)
            trained = by_transformers(model)
            assert trained != expected
            assert by_vllm(llm) == expected  # control: without a push the old adapter answers
            llm.refresh()
            assert by_vllm(llm) == trained

            for layer in llm.shared.adapter._targets:
                layer.layer.scaling["default"] *= 3  # what a script may do, and what a schedule of alphas does
            llm.refresh()
            assert by_vllm(llm) == by_transformers(model) != trained
            with model.disable_adapter():
                assert by_transformers(model) == expected
            for (n, p), (m, q) in zip(frozen.items(), base(model).items(), strict=True):
                assert n == m
                assert torch.equal(p, q), n
            assert llm.memory_report().lora_bytes > 0


def base(model):
    return {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for n, p in model.named_parameters()
        if "lora_" not in n
    }


@pytest.mark.vllm
def test_the_slot_is_pinned_and_no_file_is_read(tmp_path, turbo):
    model = with_adapter(saved(tmp_path, "qwen2_tied")[0], **CASES["a subset"])
    llm = turbo(model)
    manager = llm.llm_engine.model_executor.driver_worker.model_runner.lora_manager
    assert manager.list_adapters() == {1}
    first = [t.a.data_ptr() for t in llm.shared.adapter._targets]
    for _ in range(3):
        by_vllm(llm, PROMPTS[:1], 2)
        llm.refresh()
    assert [t.a.data_ptr() for t in llm.shared.adapter._targets] == first
    assert manager._adapter_manager.lora_index_to_id[0] == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
    ],
)
def test_what_vllm_cannot_serve_is_declined_in_words(config, words):
    from trl_turbo.engine.checks import declined

    model = with_adapter(make("qwen2"), **{"r": 4, "target_modules": ["q_proj"], **config})
    assert words in (declined(model, {}) or "")


def test_an_adapter_that_is_not_lora_is_declined():
    from peft import IA3Config, get_peft_model

    from trl_turbo.engine.checks import declined

    config = IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])
    assert "IA3" in (declined(get_peft_model(make("qwen2"), config), {}) or "")
