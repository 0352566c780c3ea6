"""What rounding explains of the log-probs' difference at start-up, and what it does not."""

from __future__ import annotations

import copy

import pytest
import torch

from trl_turbo.engine import parity

PROMPT = parity.probe_prompt(200)


def of_large_logits() -> torch.nn.Module:
    """A model whose log-probs bf16 rounds by 0.05 on average."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return model


def sampled(model: torch.nn.Module) -> tuple[list[int], list[float]]:
    """An answer and its log-probs, as an engine that does not round would give them."""
    numbers = torch.Generator().manual_seed(1)
    ids, logprobs = list(PROMPT), []
    with torch.no_grad():
        for _ in range(parity.SAMPLED_TOKENS):
            found = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            token = int(torch.multinomial(found.exp(), 1, generator=numbers))
            ids.append(token)
            logprobs.append(float(found[token]))
    return ids[len(PROMPT) :], logprobs


@pytest.fixture(scope="module")
def exact() -> torch.nn.Module:
    return of_large_logits()


@pytest.fixture(scope="module")
def answer(exact) -> tuple[list[int], list[float]]:
    return sampled(exact)


def test_a_model_is_judged_by_its_own_rounding_where_that_is_more_than_in_general(exact, answer, monkeypatch):
    monkeypatch.setitem(parity.TOLERANCE, torch.bfloat16, 0.02)
    rounded = copy.deepcopy(exact).bfloat16()
    found = parity.gap(rounded, PROMPT, *answer)
    assert 0.02 < found.mean < found.tolerance
    assert found.reason is None
    assert not any(module._forward_hooks for module in rounded.modules())


def test_layers_with_an_adapter_run_as_in_training(exact):
    """Hooks in them would take them off our kernels, with a note in the report that is not true of the training."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(exact).bfloat16(), peft.LoraConfig(target_modules="all-linear"))
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    with parity._moved(model):
        assert not any(inner._forward_hooks for layer in layers for inner in layer.modules())
        assert all(block._forward_hooks and block.mlp._forward_hooks for block in model.base_model.model.model.layers)
    ids = torch.tensor([[*PROMPT, *PROMPT]])
    assert 0 < parity.explained(model, ids, len(PROMPT)) < parity.LARGEST


@pytest.mark.parametrize("layer", [0, 3])
def test_other_weights_in_one_linear_are_no_rounding(exact, layer):
    other = copy.deepcopy(exact)
    with torch.no_grad():
        other.model.layers[layer].self_attn.o_proj.weight.normal_(std=0.1)
    found = parity.gap(copy.deepcopy(exact).bfloat16(), PROMPT, *sampled(other))
    assert found.reason is not None
    assert "where rounding explains" in found.reason


@pytest.mark.parametrize("off", [0.0, 5.0])
def test_ranks_whose_forwards_wait_for_each_other_call_as_often_whatever_they_find(exact, answer, off):
    model, calls = copy.deepcopy(exact).bfloat16(), []
    ids, logprobs = answer
    model.register_forward_hook(lambda *_: calls.append(1))
    found = parity.gap(model, PROMPT, ids, [p - off for p in logprobs], in_step=True)
    assert (found.reason is not None) == bool(off)
    assert len(calls) == 3


def test_what_rounding_explains_has_an_end(exact, answer):
    chaotic = copy.deepcopy(exact).bfloat16()
    with torch.no_grad():
        chaotic.lm_head.weight.mul_(100)
    ids, logprobs = answer
    assert parity.gap(chaotic, PROMPT, ids, logprobs).tolerance == parity.LARGEST


def test_nan_is_refused(exact, answer):
    ids, logprobs = answer
    assert parity.gap(exact, PROMPT, ids, [float("nan")] * len(logprobs)).reason is not None
    broken = copy.deepcopy(exact)
    with torch.no_grad():
        broken.lm_head.weight[0] = float("nan")
    assert parity.gap(broken, PROMPT, ids, logprobs).reason is not None
