"""One copy of the weights: every tensor is shared, and vLLM answers as the trained model does without any sync."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.engine.greedy import PROMPTS, by_transformers, by_vllm, train
from tests.engine.models import FAMILIES, saved

pytestmark = pytest.mark.vllm


def storages(module) -> dict[int, str]:
    return {p.untyped_storage().data_ptr(): name for name, p in module.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_shared_and_training_needs_no_sync(family, tmp_path, turbo):
    model, _ = saved(tmp_path, family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    expected = by_transformers(model)

    llm = turbo(model)

    assert llm.shared is not None, llm.declined
    inside = storages(llm.llm_engine.model_executor.driver_worker.model_runner.model)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name], name  # the objects that an optimizer holds
        assert parameter.untyped_storage().data_ptr() in inside, name
        assert torch.equal(parameter, before[name]), name
    assert len(llm.shared.weights) == len(parameters)
    report = llm.memory_report()
    assert report.shared_bytes == sum(p.numel() * p.element_size() for p in parameters.values())
    assert report.copied_bytes == 0

    assert by_vllm(llm) == expected

    train(model)
    trained = by_transformers(model)
    assert trained != expected
    llm.refresh()
    assert by_vllm(llm) == trained

    train(model, lr=0.02)
    llm.refresh()
    assert by_vllm(llm) == by_transformers(model)


def test_control_an_engine_with_a_copy_answers_with_old_weights(tmp_path, turbo):
    """What the tests above would miss if vLLM had weights of its own."""
    import vllm

    from tests.engine.conftest import shut_down, trl_arguments

    model, _ = saved(tmp_path, "qwen2_tied")
    expected = by_transformers(model)
    llm = vllm.LLM(
        **{**trl_arguments(model), "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 24}
    )
    assert by_vllm(llm) == expected
    train(model)
    llm.reset_prefix_cache()
    assert by_vllm(llm) == expected != by_transformers(model)
    shut_down(llm)


def test_control_without_a_reset_the_prefix_cache_keeps_old_weights(tmp_path, turbo):
    model, _ = saved(tmp_path, "qwen2_tied")
    llm = turbo(model)
    long = [list(range(4, 4 + 180))]  # more than one block of the cache, 128 tokens on a CPU
    by_vllm(llm, long)
    train(model)
    expected = by_transformers(model, long)
    assert by_vllm(llm, long) != expected
    llm.refresh()
    assert by_vllm(llm, long) == expected


def test_saving_copying_and_loading_stay_right(tmp_path, turbo):
    from transformers import AutoModelForCausalLM

    model, _ = saved(tmp_path / "model", "qwen2_tied")
    llm = turbo(model)
    train(model)

    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    size = sum(f.stat().st_size for f in (tmp_path / "saved").glob("*.safetensors"))
    assert size < 1.2 * sum(p.numel() * p.element_size() for p in model.parameters())

    twin = copy.deepcopy(model)
    mine = storages(model)
    assert not set(mine) & set(storages(twin))
    train(twin)
    llm.refresh()
    assert by_vllm(llm) == by_transformers(model) != by_transformers(twin)

    model.load_state_dict(twin.state_dict())
    llm.refresh()
    assert by_vllm(llm) == by_transformers(twin)

    torch.save(model.state_dict(), tmp_path / "state.pt")
    for name, value in torch.load(tmp_path / "state.pt").items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_weight_that_was_put_elsewhere_comes_back(tmp_path, turbo):
    model, _ = saved(tmp_path, "qwen2_tied")
    llm = turbo(model)
    other = copy.deepcopy(model)
    train(other)

    model.load_state_dict(other.state_dict(), assign=True)  # other parameters now
    model.model.layers[0].mlp.up_proj.weight.data = other.model.layers[0].mlp.up_proj.weight.data.clone()

    assert by_vllm(llm) == by_transformers(other)  # generate() notices by itself
    assert llm.shared.check() == 0
    inside = storages(llm.llm_engine.model_executor.driver_worker.model_runner.model)
    assert all(p.untyped_storage().data_ptr() in inside for p in model.parameters())


def test_a_weight_of_another_dtype_stops_generation_in_words(tmp_path, turbo):
    from trl_turbo.engine.errors import WeightsMovedError

    model, _ = saved(tmp_path, "qwen2_tied")
    llm = turbo(model)
    model.half()
    with pytest.raises(WeightsMovedError, match=r"became float16 .* was float32 .* build the trainer after"):
        by_vllm(llm, PROMPTS[:1])
    model.float()
    assert by_vllm(llm, PROMPTS[:1]) == by_transformers(model, PROMPTS[:1])


def test_a_mismatch_at_start_up_refuses_the_engine(tmp_path, turbo, monkeypatch):
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    model, folder = saved(tmp_path, "qwen2_tied")
    honest = Qwen2ForCausalLM.compute_logits
    # A model that computes something else than transformers', on the same weights
    monkeypatch.setattr(Qwen2ForCausalLM, "compute_logits", lambda self, *a, **k: honest(self, *a, **k) * 1.5)
    # What TRL's own engine would sample is not at stake here, only that it is started
    llm = turbo(model, dtype="float32", enforce_eager=True)
    assert llm.shared is None
    assert "differ from the model's own" in llm.declined
    assert llm.llm_engine.model_config.model == folder
    assert by_transformers(model)  # the trainer's model still works
    monkeypatch.undo()
    assert by_vllm(llm) == by_transformers(model)
