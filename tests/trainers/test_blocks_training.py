"""Blocks in whole trainings, stock against patched, and under all that a trainer does to a model."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from typing import Any
from unittest.mock import patch as replaced

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import trl_turbo
from trl_turbo.patches.blocks import mlp, norms, rope

from .adapters import lora
from .block_models import RUNS, make, ran, tokens
from .models import ALONE
from .parity import check
from .runs import Case

FEATURES = ("norms", "rope", "mlp")
LOW = {"bf16": True, "max_steps": 2}
UNCLIPPED = {"beta": 0.1, "epsilon": 0.99, "epsilon_high": 100.0}  # as in test_precision


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """The three features on, as a script's environment has them; and how often each op was called."""
    for feature in FEATURES:
        monkeypatch.setenv(f"TRL_TURBO_{feature.upper()}", "1")
    calls: Counter[Any] = Counter()
    for module, name in ((norms, "rms_norm"), (rope, "rope"), (mlp, "gated")):
        op = getattr(module, name)

        def counted(x: torch.Tensor, *args: Any, _op: Any = op, _name: str = name, **kwargs: Any) -> Any:
            calls[_name, torch.is_grad_enabled()] += 1
            return _op(x, *args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.trl
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("GRPO", {"max_steps": 2, "beta": 0.1}, family="qwen3"), id="GRPO"),
        pytest.param(Case("DPO", {"max_steps": 2}, family="gemma2"), id="DPO"),
        pytest.param(Case("GRPO", {**LOW, **UNCLIPPED}, dtype=torch.bfloat16), id="GRPO-autocast"),
        pytest.param(Case("DPO", LOW, family="qwen3", dtype=torch.bfloat16), id="DPO-autocast"),
        pytest.param(
            Case(
                "GRPO", {"max_steps": 2, "beta": 0.1}, peft=lora("q_proj", "gate_proj", "down_proj", lora_dropout=0.1)
            ),
            id="GRPO-lora",
        ),
        *(
            pytest.param(
                Case(
                    "DPO",
                    {
                        "max_steps": 2,
                        "gradient_checkpointing": True,
                        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
                    },
                    peft=lora() if reentrant else None,
                ),
                id=f"DPO-checkpointing-{reentrant}",
            )
            for reentrant in (True, False)
        ),
    ],
)
def test_training(case: Case, asked_for: Counter[Any]) -> None:
    check(case)
    assert all(asked_for[op, grad] for op in ("rms_norm", "rope", "gated") for grad in (True, False)), asked_for


def prepared(model: Any, **features: bool) -> Any:
    trl_turbo.patch(
        strict=True, verbose=False, logprob=False, **{**ALONE, **(features or dict.fromkeys(FEATURES, True))}
    )
    return Accelerator(cpu=True).prepare_model(model)


def test_copies_and_pickles_run_on_and_after_unpatch() -> None:
    model, ids = prepared(make("qwen3")), tokens()
    expected = model(input_ids=ids).logits
    copied = copy.deepcopy(model)
    stored = io.BytesIO()
    pickle.dump(model, stored)
    loaded = pickle.loads(stored.getvalue())
    for other in (copied, loaded):
        logits = other(input_ids=ids).logits
        assert ran(logits) == RUNS["qwen3"]
        assert torch.equal(logits, expected)
    trl_turbo.unpatch()
    for other in (model, copied, loaded):
        logits = other(input_ids=ids).logits
        assert ran(logits) == (0, 0, 0)
        assert torch.allclose(logits, expected, atol=0, rtol=1e-3)
    assert not any("_trl_turbo" in name for part in model.modules() for name in vars(part))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["no_grad", "inference", "eval", "autocast"])
def test_first_call_in_any_mode(mode: str, dtype: torch.dtype) -> None:
    """What a class computes in a state is found out in the first call, which must not be noticed."""
    model, ids = make("qwen3", dtype), tokens()
    contexts = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "eval": torch.enable_grad,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    model.train(mode != "eval")
    with contexts[mode]():
        stock = model(input_ids=ids).logits
        prepared(model)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        logits = model(input_ids=ids).logits
    assert torch.equal(before, torch.get_rng_state())
    assert torch.allclose(logits.float(), stock.float(), rtol=0, atol=0.05 * stock.float().abs().max().item())
    # The class is known now, or is found out by this call: either way it runs
    assert ran(model(input_ids=ids).logits) == RUNS["qwen3"]
    assert not trl_turbo.status().notes


@pytest.mark.parametrize("reentrant", [True, False])
def test_first_call_under_gradient_checkpointing(reentrant: bool) -> None:
    """The check comes inside the checkpointed forward, whose saved tensors are counted: its own must not be."""
    gradients = []
    for ours in (False, True):
        model, ids = make("llama", torch.bfloat16).train(), tokens()
        if ours:
            prepared(make("llama", torch.float32))  # the classes are adopted for another dtype
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        logits = model(input_ids=ids).logits
        logits.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten().float() for p in model.parameters()]))
        if ours:
            model.gradient_checkpointing_disable()
            assert ran(model(input_ids=ids).logits) == RUNS["llama"]
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_model_of_an_adopted_class_that_was_never_prepared() -> None:
    """The forward is the class's: another model, of another eps and dtype, is found out for itself."""
    prepared(make("llama"))
    other = make("llama", torch.float16, rms_norm_eps=1e-3)
    assert ran(other(input_ids=tokens()).logits) == RUNS["llama"]
    stock = make("llama", torch.float64, rms_norm_eps=1e-3)(input_ids=tokens()).logits
    assert (other(input_ids=tokens()).logits - stock).norm() < 0.02 * stock.norm()


def test_hooks_on_an_activation_are_called() -> None:
    model = prepared(make("llama"))
    seen: list[int] = []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))
    assert ran(model(input_ids=tokens()).logits) == (5, 2, 1)
    assert seen


def left_alone(model: Any, *words: str) -> None:
    """Nothing of a prepared model runs on our ops, and a note says why for each feature."""
    texts = {note.feature: note.text for note in trl_turbo.status().notes}
    assert texts.keys() == set(FEATURES), texts
    assert all(word in text for text in texts.values() for word in words), texts


def test_compiled_models_are_left_alone() -> None:
    model = make("llama")
    prepared(torch.compile(model, backend="eager"))
    left_alone(model, "LlamaForCausalLM", "torch.compile")
    assert ran(model(input_ids=tokens()).logits) == (0, 0, 0)


def test_adopted_class_compiles_as_it_was() -> None:
    """The graph that torch.compile sees is the original's, in one piece."""
    adopted = prepared(make("llama"))
    assert ran(adopted(input_ids=tokens()).logits) == RUNS["llama"]
    layer, x = adopted.model.layers[0], torch.randn(2, 5, 32)
    stock = layer.mlp(layer.input_layernorm(x))
    compiled = torch.compile(lambda x: layer.mlp(layer.input_layernorm(x)), backend="eager", fullgraph=True)(x)
    assert ran(compiled) == (0, 0, 0)
    assert torch.allclose(compiled, stock, atol=1e-5)


def test_use_kernels_is_respected() -> None:
    model = make("llama")
    model._use_kernels = True  # what from_pretrained(use_kernels=True) leaves, where `kernels` is installed
    prepared(model)
    left_alone(model, "use_kernels")
    assert ran(model(input_ids=tokens()).logits) == (0, 0, 0)


def test_meta_models_are_left_alone() -> None:
    with torch.device("meta"):
        model = make("mistral")
    with pytest.raises(NotImplementedError):  # accelerate moves it
        prepared(model)
    left_alone(model, "meta device")


def test_forwards_of_instances_are_left_alone() -> None:
    """As Liger and the hub's kernels set them on a model that exists."""
    model = make("llama")
    norm = model.model.norm
    norm.forward = lambda hidden: hidden * norm.weight
    prepared(model)
    assert ran(model(input_ids=tokens()).logits) == (4, 2, 2)
    assert any("on the instance" in note.text for note in trl_turbo.status().notes)


def test_liger_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `use_liger_kernel=True` replaced, in a file and on instances, is recognised by where it comes from."""
    from transformers.models.llama import modeling_llama

    model = make("llama")
    original, norm = modeling_llama.apply_rotary_pos_emb, model.model.norm

    def function(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        return original(q, k, cos, sin)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return type(norm).forward(norm, hidden)

    function.__module__ = forward.__module__ = "liger_kernel.transformers.rope"
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", function)
    norm.forward = forward
    with replaced.object(modeling_llama.LlamaMLP, "__module__", "liger_kernel.transformers.swiglu"):
        prepared(model)
        assert modeling_llama.apply_rotary_pos_emb is function
        assert ran(model(input_ids=tokens()).logits)[1:] == (0, 0)
    texts = [note.text for note in trl_turbo.status().notes]
    assert sum("Liger's" in text for text in texts) == 3, texts


def test_quantised_linears_are_called() -> None:
    """An MLP's linears may be anything that can be called: what lies between them is ours."""

    class Packed(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            scale = linear.weight.detach().abs().amax() / 127
            self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
            self.scale = scale.item()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight.to(x.dtype) * self.scale).T

    model = make("llama")
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Packed(getattr(layer.mlp, name)))
    stock = model(input_ids=tokens()).logits
    prepared(model)
    logits = model(input_ids=tokens()).logits
    assert ran(logits) == RUNS["llama"]
    assert torch.allclose(logits, stock, atol=1e-4)


def test_lora_has_its_mlps_to_itself() -> None:
    """With adapters and `lora` on, an MLP is one function of that patch; without either it is this one's."""
    from peft import get_peft_model

    for features, gated in (({"mlp": True}, 2), ({"mlp": True, "lora": True}, 0)):
        model = get_peft_model(make("llama"), lora("gate_proj", "up_proj", "down_proj")())
        stock = model(input_ids=tokens()).logits
        prepared(model, **features)
        logits = model(input_ids=tokens()).logits
        assert ran(logits) == (0, 0, gated)
        assert torch.allclose(logits, stock, atol=1e-4)
        trl_turbo.unpatch()


def test_deepspeed_does_not_go_around() -> None:
    """accelerate prepares a model for DeepSpeed in a method of its own, which needs DeepSpeed only after ours."""
    trl_turbo.patch(verbose=False, **{**ALONE, "norms": True})
    model = make("llama")
    with pytest.raises((ImportError, AttributeError, ValueError)):
        Accelerator(cpu=True)._prepare_deepspeed(model)
    assert ran(model(input_ids=tokens()).logits) == (5, 0, 0)
