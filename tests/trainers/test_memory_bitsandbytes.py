"""Memory where bitsandbytes is: weights in 4 bits in the plan, and optimizer state in 8 bits under `patch()`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config

import trl_turbo
from trl_turbo.memory_plan import sizes as model_sizes

from .adapters import lora
from .lora_models import ALL
from .models import turn_off
from .rule import assert_identical
from .runs import Case, build, run, train

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.trl


def test_weights_in_four_bits(tmp_path: Any) -> None:
    settings = Qwen2Config(
        vocab_size=211,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four_bit, dtype=torch.bfloat16)
    real, found = model_sizes.of_model(model), model_sizes.of_config(settings, rank=4, load_in_4bit=True)
    assert real.packed
    assert real.weight_bytes == pytest.approx(found.weight_bytes, rel=0.005)
    assert real.groups == tuple(tuple(type(x)(x.inputs, x.outputs) for x in group) for group in found.groups)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_optimizers_in_eight_bits(optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script asks for it, and nothing of ours is in its way. Tensors under 4,096 numbers keep 32 bits."""
    options = {"optim": optim, "beta": 0.1, "gradient_checkpointing": True, "max_steps": 2}
    case = Case("GRPO", options, peft=lora(*ALL, r=128))
    plain = run(case)
    turn_off(monkeypatch)
    trl_turbo.patch(mlp_tiling=True, memory=True, verbose=False)
    trainer = build(case)
    assert_identical(plain, train(trainer))
    states = trainer.optimizer.state.values()
    assert any(state["state1"].dtype == torch.uint8 for state in states)
    if optim == "adamw_8bit":
        small = sum(t.nbytes for s in states for t in s.values() if torch.is_tensor(t))
        assert trl_turbo.plan(trainer).moments["backward"]["optimizer"] == small
