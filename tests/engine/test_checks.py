"""What is declined before anything is built, in one sentence each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.engine.models import make
from trl_turbo.engine.checks import declined


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
