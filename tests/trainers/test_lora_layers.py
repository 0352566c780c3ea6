"""PEFT models under `patch(lora=True)`: every setting is right, or left to PEFT with a note that says why."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import trl_turbo
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.kernels.lora import scratch
from trl_turbo.patches.lora.plan import Left, projection

from .lora_models import ALL, PHI3, adapted, distance, passed, patched, tokens
from .models import ALONE, folder

U = 2.0**-24
# Two float32 passes that sum in another order, over two decoder layers: 64 roundings. The rule against float64 is
# `excess_error`; this bound is for what float64 cannot draw alike, such as dropout
CLOSE = 64 * U
SLACK = 0.2

FAMILIES = {"llama": ALL, "qwen2": ALL, "gemma2": ALL, "qwen3": ALL, "phi3": PHI3}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_as_near_float64_as_stock(family: str) -> None:
    model = adapted(family, FAMILIES[family])
    stock = passed(model)
    with patched(model) as ran:
        ours = passed(model)
    truth = passed(model.double())
    grouped = {"mlp": 2, "qkv": 2, "linear": 2}  # two decoder layers; the linear is o_proj
    assert dict(ran) == ({"linear": 8} if family == "phi3" else grouped)
    assert not ran.notes
    assert ours.keys() == stock.keys()
    for part in (["logits"], [name for name in ours if name != "logits"]):
        one, other, true = (torch.cat([run[name].flatten() for name in part]) for run in (ours, stock, truth))
        assert excess_error(one, other, true, SLACK) <= 1


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "v_proj"], ["down_proj"], ["up_proj", "o_proj"]], ids=str)
def test_some_linears_alone(targets: list[str]) -> None:
    model = adapted(targets=targets)
    stock = passed(model)
    with patched(model) as ran:
        assert distance(passed(model), stock) <= CLOSE
    assert ran["qkv"] == 2 * (len(targets) == 2 and "v_proj" in targets)
    assert ran["mlp"] == 2 * any(name in targets for name in ("down_proj", "up_proj"))


PLAIN: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 8, "up_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "modules-to-save": {"modules_to_save": ["lm_head"], "targets": ALL},
    "token-indices": {"trainable_token_indices": {"embed_tokens": [5, 6, 7]}},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.mark.parametrize("kind", PLAIN)
def test_settings_that_are_plain_lora(kind: str) -> None:
    model = adapted(**PLAIN[kind])
    stock = passed(model)
    with patched(model) as ran:
        ours = passed(model)
    assert (ran["mlp"], ran["qkv"], ran["linear"]) == (2, 2, 2)
    assert not ran.notes
    assert distance(ours, stock) <= CLOSE


def test_dropout_is_off_in_evaluation_and_control() -> None:
    model = adapted(lora_dropout=0.3)
    training = passed(model)
    model.eval()
    stock = passed(model)
    assert distance(training, stock) > 1e-3  # control: it was on
    with patched(model):
        assert distance(passed(model), stock) <= CLOSE


LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "not plain LoRA"),
    "lora-bias": ({"lora_bias": True, "family": "qwen2", "targets": ["q_proj", "v_proj"]}, "lora_bias=True"),
    "base-bias": (
        {"bias": "lora_only", "family": "qwen2", "targets": ["q_proj", "v_proj"]},
        "trainable weights or biases",
    ),
}


@pytest.mark.parametrize("kind", LEFT)
def test_settings_that_are_left_to_peft(kind: str) -> None:
    settings, why = LEFT[kind]
    model = adapted(**settings)
    stock = passed(model)
    with patched(model) as ran:
        ours = passed(model)
    assert not ran["mlp"] + ran["qkv"] + ran["linear"]
    assert any(why in note for note in ran.notes), ran.notes
    assert distance(ours, stock) == 0


def test_trainable_base_weight_is_left_to_peft() -> None:
    model = adapted(targets=["o_proj"])
    for layer in model.base_model.model.model.layers:
        layer.self_attn.o_proj.base_layer.weight.requires_grad_()
    stock = passed(model)
    with patched(model) as ran:
        ours = passed(model)
    assert any("base_layer.weight" in name for name in ours)
    assert distance(ours, stock) == 0
    assert any("trainable weights" in note for note in ran.notes)


def test_several_adapters_and_the_one_named_ref() -> None:
    model = adapted()
    for name, rank in (("other", 3), ("ref", 4)):
        model.add_adapter(name, LoraConfig(r=rank, lora_alpha=6, target_modules=ALL, init_lora_weights=False))
    for active in ("other", "ref", "default", ["default", "other"]):
        model.base_model.set_adapter(active)
        stock = passed(model)
        with patched(model) as ran:
            assert distance(passed(model), stock) <= CLOSE, active
        assert (ran["mlp"], ran["qkv"], ran["linear"]) == (2, 2, 2)


def test_disabled_merged_and_unmerged() -> None:
    model = adapted()
    adapted_logits = passed(model)["logits"]
    with model.disable_adapter():
        base = passed(model)["logits"]
    with patched(model) as ran:
        with model.disable_adapter():
            assert torch.equal(passed(model)["logits"], base)
        model.merge_adapter()
        merged = passed(model)["logits"]
        assert not ran
        with model.disable_adapter():  # PEFT unmerges by itself
            torch.testing.assert_close(passed(model)["logits"], base)
        assert not ran
        torch.testing.assert_close(passed(model)["logits"], adapted_logits)
        assert ran["mlp"] == 2
    torch.testing.assert_close(merged, adapted_logits)
    assert not torch.equal(base, adapted_logits)
    assert not ran.notes


def test_batches_that_mix_adapters() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=3, target_modules=ALL, init_lora_weights=False))
    model.eval()
    names = {"adapter_names": ["other", "__base__"]}
    with torch.no_grad():
        stock = passed(model, **names)["logits"]
        with patched(model) as ran:
            assert torch.equal(passed(model, **names)["logits"], stock)
    assert any("adapter_names" in note for note in ran.notes)
    assert not ran["linear"]


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
def test_fp32_adapters_under_autocast_and_not(base: torch.dtype, autocast: bool) -> None:
    model = adapted("llama")
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(base)

    def once() -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return passed(model)

    stock = once()
    with patched(model) as ran:
        ours = once()
    truth = passed(model.double())
    assert ran["linear"] == 2
    for name in ours:
        assert ours[name].dtype == stock[name].dtype
    for part in (["logits"], [name for name in ours if name != "logits"]):
        # Not of other dtypes than they are in, whose last place the rule counts in
        one, other, true = (torch.cat([run[name].flatten() for name in part]) for run in (ours, stock, truth))
        assert excess_error(one, other, true, SLACK) <= 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing(reentrant: bool, dropout: float) -> None:
    model = adapted("qwen2", lora_dropout=dropout)
    plain = passed(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    stock = passed(model)
    with patched(model) as ran:
        ours = passed(model)
    assert ran["mlp"] == 4, "each layer runs twice"
    assert distance(stock, plain) <= CLOSE
    assert distance(ours, stock) <= CLOSE


def test_hooks_on_a_projection_run_and_count() -> None:
    """One that changes the input of v_proj, one that changes what k_proj answers, each way."""
    model = adapted("llama")
    attention = model.base_model.model.model.layers[1].self_attn
    attention.v_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    attention.k_proj.register_forward_hook(lambda module, args, output: output + 1)
    attention.q_proj.register_full_backward_hook(
        lambda module, grads, _: (grads[0] * 0.5,)
    )  # the first layer's x has none
    stock = passed(model)
    with patched(model):
        assert distance(passed(model), stock) <= CLOSE
        assert distance(passed(model), stock) <= CLOSE  # and after the group was given up


def test_hooks_inside_a_layer_or_an_mlp_are_not_passed_by() -> None:
    model = adapted("llama")
    layer = model.base_model.model.model.layers[0]
    seen = []

    def watch(*_: Any) -> None:
        seen.append("base")

    layer.self_attn.o_proj.base_layer.register_forward_hook(watch)
    layer.self_attn.q_proj.lora_A["default"].register_forward_hook(lambda *_: seen.append("lora_A"))
    layer.mlp.up_proj.register_forward_hook(lambda *_: seen.append("up"))
    stock = passed(model)
    wanted, seen[:] = list(seen), []
    with patched(model) as ran:
        assert distance(passed(model), stock) <= CLOSE
    assert seen == wanted
    assert len(seen) == 3
    assert ran["mlp"] == 1
    assert {"MLPs with hooks inside run linear by linear"} < set(ran.notes)
    sizes = {p: getattr(layer.self_attn, p).base_layer for p in ("o_proj", "q_proj")}
    for name, part in (("o_proj", "the one"), ("q_proj", "lora_A of 'default'")):
        where = f"{part} from {sizes[name].in_features:,} to {sizes[name].out_features:,} features has the hook "
        (said,) = (text for text in ran.notes if where in text)
        assert "; remove it, " in said
        assert ("watch;" in said) == (name == "o_proj")


def test_an_input_written_to_between_two_projections_is_read_again() -> None:
    model = adapted("llama")
    attention = model.base_model.model.model.layers[0].self_attn

    def double(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        args[0].mul_(2)

    attention.v_proj.register_forward_pre_hook(double)
    with torch.no_grad():
        stock = passed(model)
        with patched(model) as ran:
            ours = passed(model)
    assert ran["qkv"] == 2
    torch.testing.assert_close(ours["logits"], stock["logits"])


def test_an_exception_inside_attention_leaves_nothing_behind() -> None:
    from trl_turbo.patches.lora import group

    model = adapted("llama")
    attention = model.base_model.model.model.layers[0].self_attn
    stock = passed(model)

    def fail(*_: Any) -> None:
        raise KeyError("in between")

    with patched(model) as ran:
        handle = attention.k_proj.register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            passed(model)
        assert getattr(group._local, "group", None) is None
        handle.remove()
        assert distance(passed(model), stock) <= CLOSE
    assert ran["qkv"] == 3


def test_threads_have_groups_of_their_own() -> None:
    model = adapted("llama").eval()
    ids = [tokens().roll(i, 1) for i in range(4)]
    with torch.no_grad():
        stock = [model(input_ids=x).logits for x in ids]
        wrong: list[int] = []

        def work(index: int) -> None:
            with torch.no_grad():
                for _ in range(5):
                    if not torch.allclose(model(input_ids=ids[index]).logits, stock[index], atol=1e-5):
                        wrong.append(index)

        with patched(model):
            workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
    assert not wrong


def test_under_torch_compile_peft_runs_and_nothing_breaks_the_graph() -> None:
    model = adapted("llama", ["o_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    x = torch.randn(3, 32)
    stock = layer(x)
    with patched(model) as ran:
        compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.equal(compiled, stock)
    assert not ran
    assert any("torch.compile" in note for note in ran.notes)
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_projections_with_inputs_of_their_own_are_right(checkpointing: bool) -> None:
    """Keys and values of one layer are projected from another tensor than queries."""
    model = adapted("llama")
    for name in ("k_proj", "v_proj"):
        projection = getattr(model.base_model.model.model.layers[1].self_attn, name)
        projection.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stock = passed(model)
    with patched(model) as ran:
        for _ in range(2):
            assert distance(passed(model), stock) <= CLOSE
    assert any("not called with the input of the others" in note for note in ran.notes)


def test_an_mlp_that_computes_something_else_is_left() -> None:
    model = adapted("llama")
    block = model.base_model.model.model.layers[0]

    class Squared(type(block.mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) ** 2)

    block.mlp.__class__ = Squared
    stock = passed(model)
    with patched(model) as ran:
        assert distance(passed(model), stock) <= CLOSE
    assert ran["mlp"] == 1
    assert any("Squared" in note for note in ran.notes), ran.notes


def test_sharded_by_fsdp2_in_one_process() -> None:
    """FSDP 2 shows whole parameters while a layer runs: it is right, whoever runs it."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if dist.is_initialized():
        pytest.skip("another test holds a process group")
    model = adapted("llama")
    stock = passed(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for block in model.base_model.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with patched(model):
            found = passed(model)
        found = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in found.items()}
        assert distance(found, stock) <= CLOSE
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_quantised_models(kind: str, checkpointing: bool) -> None:
    """All the same as over a dense base, with double-quantised nf4 and with LLM.int8."""
    pytest.importorskip("bitsandbytes")
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = {
        "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "8bit": {"load_in_8bit": True},
    }[kind]
    model = AutoModelForCausalLM.from_pretrained(
        folder("llama"), quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32, device_map="cpu"
    )
    config = LoraConfig(r=4, target_modules=ALL, init_lora_weights=False, lora_dropout=0.2)
    model = get_peft_model(model, config).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    passed(model)  # a 4-bit base chooses its dtype in its first pass
    stock = passed(model)
    with patched(model) as ran:
        ours = passed(model)
        assert scratch.held_bytes() > 0
    assert scratch.held_bytes() == 0, "unpatch() gives the buffer back"
    assert (ran["mlp"], ran["qkv"], ran["linear"]) == ((4, 4, 4) if checkpointing else (2, 2, 2)), ran.notes
    assert distance(ours, stock) <= CLOSE


def test_together_with_the_blocks_an_mlp_with_adapters_is_one_function() -> None:
    """Both replace the forward of its class; ours comes first, the other serves MLPs without adapters."""
    from accelerate import Accelerator

    model = adapted("qwen3")
    stock = passed(model)
    others = {"norms": True, "rope": True, "mlp": True}
    with patched() as ran:
        trl_turbo.patch(**{**ALONE, "lora": True, **others}, strict=True, verbose=False)
        Accelerator(cpu=True).prepare_model(model)
        ours = passed(model)
    assert (ran["mlp"], ran["qkv"], ran["linear"]) == (2, 2, 2)
    assert distance(ours, stock) <= CLOSE


def test_weights_that_stand_for_parameters_or_are_marked_as_zero_3s_shards_are_left_to_peft() -> None:
    model = adapted("llama", ["o_proj"])
    ids = {"input_ids": tokens(), "use_cache": False}
    swapped = {name: p.detach().clone() for name, p in model.named_parameters()}
    stock = passed(model)
    with patched(model) as ran, torch.no_grad():
        logits = torch.func.functional_call(model, swapped, (), ids).logits
        assert torch.equal(logits, stock["logits"])
        for layer in model.base_model.model.model.layers:
            layer.self_attn.o_proj.base_layer.weight.ds_id = 0  # what DeepSpeed marks a parameter with
        assert torch.equal(model(**ids).logits, stock["logits"])
    assert not ran["linear"]
    assert any("sharded" in note for note in ran.notes)


def test_unpatch_restores_the_classes() -> None:
    from accelerate import Accelerator
    from peft.tuners.lora.layer import Linear

    model = adapted("llama")
    block = model.base_model.model.model.layers[0]
    owners = (Linear, type(block.mlp), type(block.self_attn), Accelerator)
    before = [dict(vars(owner)) for owner in owners]
    with patched(model):
        during = [dict(vars(owner)) for owner in owners]
        passed(model)
    assert all(now != then for now, then in zip(during, before, strict=True))
    assert [dict(vars(owner)) for owner in owners] == before


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_TURBO_LORA", "0")
    rows = [row for row in trl_turbo.patch(verbose=False) if row.feature == "lora"]
    assert {row.name for row in rows} >= {"lora.linear", "lora.models"}
    assert all(row.status == "off" for row in rows)
    assert "TRL_TURBO_LORA=0" in rows[0].reason


def test_liger_on_the_instance_is_respected() -> None:
    model = adapted("llama")
    mlp = model.base_model.model.model.layers[0].mlp
    own = type(mlp).forward
    mlp.forward = lambda x: own(mlp, x)
    stock = passed(model)
    with patched(model) as ran:
        assert distance(passed(model), stock) <= CLOSE
    assert any("forward of its own" in note for note in ran.notes)
    assert isinstance(mlp, nn.Module)


def test_a_layer_without_a_weight_is_left() -> None:
    """As those of some quantisations, beside LoRA layers in one MLP."""
    with pytest.raises(Left, match="a base of Identity runs PEFT's own forward"):
        projection(nn.Identity(), torch.float32, torch.device("cpu"))
