"""A PEFT adapter in vLLM's buffers: served after each push, stale without one, declined where there is no place."""

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
    "rank-stabilised": {
        "r": 16,
        "lora_alpha": 24,
        "use_rslora": True,
        "target_modules": ["k_proj", "up_proj", "down_proj"],
    },
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


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "embed_tokens"], "all-linear"], ids=str)
def test_layers_of_an_adapter_are_those_of_a_walk_through_every_module(targets):
    from peft import LoraConfig

    from trl_turbo.engine.adapter_config import adapter_layers

    model = with_adapter(make("qwen2"), r=8, target_modules=targets, modules_to_save=["norm"])
    model.add_adapter("other", LoraConfig(r=4, target_modules=["v_proj", "q_proj"]))
    for name in ("default", "other", "none"):
        for outer in (model, model.get_base_model()):
            found = adapter_layers(outer, name)
            wanted = {
                path.removeprefix("base_model.model."): module
                for path, module in outer.named_modules()
                if name in getattr(module, "lora_A", {}) or name in getattr(module, "lora_embedding_A", {})
            }
            assert list(found) == list(wanted)
            assert all(layer is wanted[path] for path, layer in found.items())
            assert bool(found) == (name != "none")


@pytest.mark.vllm
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_served_as_it_is_trained(case, tmp_path, turbo):
    model, _ = saved(tmp_path, "qwen2_tied")
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    model = with_adapter(model, **CASES[case])
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

    for target in llm.shared.adapter._targets:
        target.layer.scaling["default"] *= 3  # as a schedule of alphas does
    llm.refresh()
    assert by_vllm(llm) == by_transformers(model) != trained
    with model.disable_adapter():
        assert by_transformers(model) == expected
    for (n, p), (m, q) in zip(frozen.items(), base(model).items(), strict=True):
        assert n == m
        assert torch.equal(p, q), n
    assert llm.memory_report().lora_bytes > 0


@pytest.mark.vllm
def test_a_merged_adapter_answers_the_same_and_leaves_no_trace(tmp_path, turbo, monkeypatch):
    import trl_turbo
    from trl_turbo.engine import merged

    report = trl_turbo.patch(logprob=False, rollout=True, rollout_adapter="merged", verbose=False)
    model, _ = saved(tmp_path, "qwen2_tied")
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    model = with_adapter(model, **CASES["all linears"])
    llm = turbo(model)
    assert llm.shared is not None, llm.declined
    assert llm.shared.fold is not None
    assert "folded into the base" in report.notes[0].text
    for _ in range(2):
        train(model, steps=2, lr=0.01)
        expected = by_transformers(model)
        llm.refresh()
        assert by_vllm(llm) == expected
        assert all(torch.equal(p, q) for p, q in zip(frozen.values(), base(model).values(), strict=True))

    # An adapter that rounding does not bring back cheaply is served instead, and the answer stays right
    monkeypatch.setattr(merged, "LOG_SHARE", 0.0)
    llm.refresh()
    assert by_vllm(llm) == expected
    assert llm.shared.fold is None
    assert any("served unmerged from now on" in note.text for note in report.notes)
    train(model, steps=1, lr=0.01)
    llm.refresh()
    assert by_vllm(llm) == by_transformers(model)
    trl_turbo.unpatch()


@pytest.mark.vllm
def test_an_error_during_a_merged_rollout_restores_the_base(tmp_path, turbo, monkeypatch):
    monkeypatch.setenv("TRL_TURBO_ROLLOUT_ADAPTER", "merged")
    model, _ = saved(tmp_path, "qwen2_tied", dtype=torch.bfloat16)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    model = with_adapter(model, **CASES["all linears"])
    llm = turbo(model)
    assert llm.shared is not None, llm.declined
    train(model, steps=2, lr=0.01)

    def planted(*args, **kwargs):
        assert llm.shared.fold.folded
        raise RuntimeError("planted")

    with monkeypatch.context() as broken:
        broken.setattr("vllm.LLM.generate", planted)
        with pytest.raises(RuntimeError, match="planted"):
            by_vllm(llm)
    assert not llm.shared.fold.folded
    assert all(torch.equal(p, q) for p, q in zip(frozen.values(), base(model).values(), strict=True))
    by_vllm(llm)
    assert all(torch.equal(p, q) for p, q in zip(frozen.values(), base(model).values(), strict=True))


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
    wrapped = {name.rpartition(".")[2] for name in manager._adapter_manager.modules}
    assert wrapped == {"qkv_proj"}  # no buffers and no products for what the adapter does not touch
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
