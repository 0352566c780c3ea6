"""What is declined before anything is built, in one sentence each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.engine.models import make
from trl_turbo.engine.checks import declined, parallelism, unservable


@pytest.fixture(scope="module")
def model():
    return make("qwen2_tied")


def test_a_plain_model_is_taken(model):
    assert declined(model, {"tensor_parallel_size": 1, "quantization": None, "model_impl": "auto"}) is None


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"quantization": "fp8"}, "quantization='fp8'"),
        ({"dtype": "bfloat16"}, "float32"),
        ({"model_impl": "transformers"}, "model_impl='transformers'"),
    ],
)
def test_settings(model, kwargs, words):
    assert words in (declined(model, kwargs) or "")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"fsdp_plugin": object()}, "FSDP"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "ZeRO stage 3"),
    ],
)
def test_sharded_training(model, state, words):
    assert words in (declined(model, {}, SimpleNamespace(state=SimpleNamespace(**state))) or "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": 8}, "mixture of experts"),
        ({"kv_lora_rank": 64}, "latent attention"),
        ({"vision_config": object()}, "images"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised (fp8)"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_models(change, words):
    model = make("qwen2_tied")
    for name, value in change.items():
        setattr(model.config, name, value)
    assert words in (declined(model, {}) or "")


def test_two_dtypes_and_devices():
    model = make("qwen2_tied")
    model.model.norm.half()
    assert "float16 and float32" in (declined(model, {}) or "")
    model = make("qwen2_tied")
    model.model.norm.weight = nn.Parameter(torch.empty(128, device="meta"))
    assert "2 devices" in (declined(model, {}) or "")


def _peft(**config):
    peft = pytest.importorskip("peft")
    chosen = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **config}
    return peft.get_peft_model(make("qwen2_tied"), peft.LoraConfig(**chosen))


@pytest.mark.parametrize(
    ("kwargs", "state", "words"),
    [
        ({"tensor_parallel_size": 2}, {}, "tensor_parallel_size is 2"),
        ({}, {"fsdp_plugin": object()}, "FSDP"),
        ({}, {"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, "ZeRO stage 2"),
        ({"tensor_parallel_size": 1, "quantization": "fp8"}, {}, None),  # declined for something else
    ],
)
def test_what_is_declined_for_parallelism_alone(model, kwargs, state, words):
    found = parallelism(model, kwargs, SimpleNamespace(state=SimpleNamespace(**state)))
    assert found is None if words is None else words in found


@pytest.mark.parametrize(
    ("config", "kwargs", "state", "words"),
    [
        ({}, {"tensor_parallel_size": 2}, {"fsdp_plugin": SimpleNamespace(fsdp_version=2)}, None),
        ({}, {}, {"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, None),
        ({}, {"pipeline_parallel_size": 2}, {}, "pipeline_parallel_size is 2"),
        ({}, {"quantization": "bitsandbytes"}, {}, "quantised"),
        ({}, {"model_impl": "transformers"}, {}, "model_impl='transformers'"),
        ({}, {}, {"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "set fsdp_version to 2"),
        ({"use_dora": True}, {}, {}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, {}, {}, "modules_to_save"),
    ],
)
def test_an_adapter_that_cannot_be_pushed_alone(config, kwargs, state, words):
    found = unservable(_peft(**config), kwargs, SimpleNamespace(state=SimpleNamespace(**state)))
    assert found is None if words is None else words in found


def test_weights_that_are_trained_beside_the_adapter():
    model = _peft()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    assert "model.norm.weight is trained beside the adapter" in unservable(model, {})


def test_an_adapter_that_is_to_be_folded_can_be_pushed(monkeypatch):
    monkeypatch.setenv("TRL_TURBO_ROLLOUT_ADAPTER", "merged")
    assert unservable(_peft(), {"tensor_parallel_size": 2}) is None
