"""`save_lora`, `load_lora` and `save_pretrained_merged`, with real PEFT models."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_turbo

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**settings: Any) -> LoraConfig:
    made = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False, **settings}
    return LoraConfig(task_type="CAUSAL_LM", **made)


def adapted(tiny: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **settings: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype), lora(**settings))


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if "lora_" in name}


def test_an_adapter_comes_back_into_the_same_tensors(tiny, tmp_path):
    saved, other = adapted(tiny), adapted(tiny, seed=1)
    trl_turbo.save_lora(saved, tmp_path, AutoTokenizer.from_pretrained(tiny))
    before = {name: value.data_ptr() for name, value in adapter(other).items()}
    assert any(not torch.equal(value, adapter(other)[name]) for name, value in adapter(saved).items())
    assert trl_turbo.load_lora(other, tmp_path) is other
    assert {name: value.data_ptr() for name, value in adapter(other).items()} == before
    for name, value in adapter(saved).items():
        assert torch.equal(value, adapter(other)[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path).vocab_size


def test_a_model_without_an_adapter_gets_the_saved_one_to_train(tiny, tmp_path):
    saved = adapted(tiny, torch.float32)
    trl_turbo.save_lora(saved, tmp_path)
    made = trl_turbo.load_lora(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tmp_path)
    assert adapter(made).keys() == adapter(saved).keys()
    for name, value in adapter(saved).items():
        assert torch.equal(value, adapter(made)[name])
        assert adapter(made)[name].requires_grad


@pytest.mark.parametrize("settings", [{"r": 8}, {"target_modules": ["q_proj"]}], ids=["rank", "targets"])
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(tiny, tmp_path, settings):
    trl_turbo.save_lora(adapted(tiny), tmp_path)
    other = adapted(tiny, **settings)
    before = {name: value.clone() for name, value in adapter(other).items()}
    with pytest.raises(ValueError, match=r"does not fit the model's active one: .* pass the model without an adapter"):
        trl_turbo.load_lora(other, tmp_path)
    assert all(torch.equal(value, adapter(other)[name]) for name, value in before.items())


def test_a_model_without_an_adapter_has_none_to_save(tiny, tmp_path):
    with pytest.raises(TypeError, match="Qwen2ForCausalLM has no adapter to save; save_lora takes a PEFT model"):
        trl_turbo.save_lora(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"target_modules": [*TARGETS, "lm_head"]},
    "embedding": {"target_modules": [*TARGETS, "embed_tokens"]},
    "saved-module": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_merge_and_unload_to_the_bit_and_the_model_stays(tiny, tmp_path, kind, dtype):
    model = adapted(tiny, dtype, **KINDS[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trl_turbo.save_pretrained_merged(model, tmp_path, AutoTokenizer.from_pretrained(tiny))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(getattr(module, "merged", False) for module in model.modules())

    wanted = copy.deepcopy(model)
    if kind in ("head", "embedding"):
        # Of two tied weights merge_and_unload changes both where one has an adapter, which is not what was trained
        head = wanted.get_base_model().lm_head
        head = getattr(head, "base_layer", head)
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    wanted = wanted.merge_and_unload()
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert found.dtype == dtype
    assert found.config.tie_word_embeddings == (kind not in ("head", "embedding"))
    expected = wanted.state_dict()
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
    ids = torch.arange(5, 25)[None]
    assert torch.equal(found(input_ids=ids).logits, wanted.eval()(input_ids=ids).logits)


def test_merged_takes_a_dtype_and_a_model_without_an_adapter(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    trl_turbo.save_pretrained_merged(model, tmp_path, dtype=torch.bfloat16)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert found.dtype == torch.bfloat16
    assert all(torch.equal(v, model.state_dict()[k].bfloat16()) for k, v in found.state_dict().items())


def test_another_adapter_than_lora_is_refused(tiny, tmp_path):
    from peft import IA3Config

    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    with pytest.raises(ValueError, match="is no LoRA layer; save_pretrained_merged merges LoRA adapters"):
        trl_turbo.save_pretrained_merged(model, tmp_path)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_merged_from_four_bits_is_the_dequantised_model_merged(tiny, tmp_path, quant_type):
    from transformers import BitsAndBytesConfig

    quantised = AutoModelForCausalLM.from_pretrained(
        tiny,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch.bfloat16
        ),
    )
    torch.manual_seed(0)
    model = get_peft_model(quantised, lora())
    trl_turbo.save_pretrained_merged(model, tmp_path)
    assert any("quant_state" in name for name in model.state_dict()), "it is in 4 bits still"
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert found.dtype == torch.bfloat16
    assert getattr(found.config, "quantization_config", None) is None

    # The truth: transformers' own dequantisation, then PEFT's own merge
    plain = AutoModelForCausalLM.from_pretrained(
        tiny,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch.bfloat16
        ),
    ).dequantize()
    torch.manual_seed(0)
    wanted = get_peft_model(plain, lora())
    wanted.load_state_dict(adapter(model), strict=False)
    expected = wanted.merge_and_unload().state_dict()
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
