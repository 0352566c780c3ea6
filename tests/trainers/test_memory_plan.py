"""The plan's arithmetic against real tensors: weights, adapters, and what one layer keeps and takes."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import trl_turbo
from trl_turbo._features import Switches
from trl_turbo.memory_plan import predict
from trl_turbo.memory_plan import sizes as model_sizes
from trl_turbo.memory_plan.layer import TILE_ROWS, layer_bytes
from trl_turbo.memory_plan.prediction import FEATURES, Settings
from trl_turbo.memory_plan.table import KEPT as BY_TORCH
from trl_turbo.memory_plan.table import REMEDIES

from .models import ALONE

FAMILIES = ("Qwen2Config", "Qwen3Config", "LlamaConfig", "Phi3Config", "Gemma2Config")
TOKENS, BATCH = 256, 2


def config(family: str = "Qwen2Config", **settings: Any) -> Any:
    sizes = {
        "vocab_size": 211,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pad_token_id": 0,
    }
    return getattr(transformers, family)(**{**sizes, **settings})


def made(family: str, rank: int, adapter_dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    kwargs = {} if family == "Gemma2Config" else {"attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_config(config(family), dtype=torch.bfloat16, **kwargs)
    if rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
    return model


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_adapters_of_a_configuration_are_those_of_the_model(family: str, rank: int) -> None:
    model = made(family, rank)
    found = model_sizes.of_config(config(family), rank=rank)
    real = model_sizes.of_model(model)
    adapters = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    assert found.weight_bytes == real.weight_bytes == sum(p.nbytes for p in model.parameters()) - adapters
    assert found.adapter_bytes == real.adapter_bytes == adapters
    assert found.trainable == real.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (found.groups, found.norms, found.inner) == (real.groups, real.norms, real.inner)
    assert found.inner == 384


class Live(TorchDispatchMode):
    """Bytes of the storages that are made while it is on and not yet gone; views of what was there are none."""

    def __init__(self, there: set[int]) -> None:
        super().__init__()
        self.there = there
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                made = storage._cdata not in self.sizes and storage.data_ptr() not in self.there
                if made and storage.nbytes():
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


class OneLayer:
    """The second layer of a model as a trainer runs it, under bf16 autocast."""

    def __init__(self, family: str, rank: int, features: tuple[str, ...], adapter_dtype: torch.dtype) -> None:
        if features:
            trl_turbo.patch(verbose=False, **{**ALONE, **dict.fromkeys(features, True)})
        self.model = made(family, rank, adapter_dtype)
        Accelerator(cpu=True).prepare_model(self.model)
        self.model.train()
        self.base = self.model.get_base_model() if rank else self.model
        self.positions = torch.arange(TOKENS)[None]
        self.x = torch.randn(BATCH, TOKENS, 128, dtype=torch.bfloat16).requires_grad_()
        self.rotary = self.base.model.rotary_emb(self.x.detach(), self.positions)
        self.forward()  # what is looked up once has been

    def forward(self) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.base.model.layers[1](
                self.x, position_embeddings=self.rotary, attention_mask=None, position_ids=self.positions
            )
        return y[0] if isinstance(y, tuple) else y

    def shared(self) -> set[int]:
        """Where parameters are, and what all layers have in common."""
        return {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.rotary)}

    def kept(self) -> int:
        """Bytes that the forward saves, without parameters and what all layers share."""
        shared = self.shared()
        found: dict[int, int] = {}
        held = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in shared:
                found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held.append(self.forward())
        return sum(found.values())

    def peak(self) -> int:
        """Bytes that are there at most in forward and backward, parameters' gradients left out."""
        with Live(self.shared()) as live:
            y = self.forward()
            y.backward(torch.ones_like(y))
        return live.peak


@pytest.fixture(autouse=True)
def _nothing_else() -> Iterator[None]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


KEPT = [
    ("Qwen2Config", 4, (), torch.float32),
    ("Qwen2Config", 0, (), torch.float32),
    ("Qwen3Config", 4, (), torch.float32),
    ("LlamaConfig", 4, (), torch.bfloat16),
    ("Qwen2Config", 0, ("norms", "rope", "mlp"), torch.float32),
    ("Qwen2Config", 4, ("norms", "rope", "mlp", "lora"), torch.float32),
    ("Qwen2Config", 4, ("lora",), torch.float32),
    ("LlamaConfig", 4, ("norms", "rope", "mlp", "lora"), torch.bfloat16),
]


@pytest.mark.parametrize(("family", "rank", "features", "dtype"), KEPT)
def test_what_a_layer_keeps(family: str, rank: int, features: tuple[str, ...], dtype: torch.dtype) -> None:
    layer = OneLayer(family, rank, features, dtype)
    found = layer_bytes(model_sizes.of_model(layer.model), BATCH * TOKENS, features)
    # One number a row of each norm is in it or not; nothing else is left to chance
    assert found.kept == pytest.approx(layer.kept(), rel=0.015)


@pytest.mark.parametrize(("family", "rank", "features", "dtype"), [case for case in KEPT[:4] if case[1]])
def test_what_a_layer_takes(family: str, rank: int, features: tuple[str, ...], dtype: torch.dtype) -> None:
    """Of transformers' and PEFT's code, which the CPU runs as a GPU does; ours has other code on the CPU."""
    layer = OneLayer(family, rank, features, dtype)
    found = layer_bytes(model_sizes.of_model(layer.model), BATCH * TOKENS, features)
    own_input = layer.x.nbytes  # which was there before
    assert found.peak == pytest.approx(layer.peak() + own_input, rel=0.05)


@pytest.mark.parametrize("features", [("norms", "mlp", "mlp_tiling"), ("norms", "lora")])
def test_tiles_bound_the_mlp(features: tuple[str, ...]) -> None:
    sizes = model_sizes.of_config(config(intermediate_size=16_384), rank=4)

    def peak(tokens: int, *, recomputed: bool = True) -> int:
        return layer_bytes(sizes, tokens, features, recomputed=recomputed).peak

    short, tile, long = (peak(n) for n in (TILE_ROWS // 2, TILE_ROWS, 16 * TILE_ROWS))
    assert short < tile < long < peak(16 * TILE_ROWS, recomputed=False)
    # Beyond a tile only what is as wide as the hidden size grows
    assert (long - peak(8 * TILE_ROWS)) / (8 * TILE_ROWS) < sizes.itemsize * sizes.inner


def test_longest_sequence_is_the_longest_that_fits() -> None:
    plan = predict(config(), prompt=16, completion=64, gpu_bytes=2 << 30)
    longest = plan.longest_sequence()
    assert longest > 64
    fits = predict(config(), prompt=16, completion=longest, gpu_bytes=2 << 30)
    assert fits.fits
    assert not predict(config(), prompt=16, completion=longest + 1, gpu_bytes=2 << 30).fits
    assert plan.longest_sequence(1 << 20) == 0
    with pytest.raises(ValueError, match="pass gpu_bytes"):
        predict(config()).longest_sequence()


def test_what_patch_has_on_by_default_is_planned_by_default() -> None:
    switches = Switches({}, {}).resolve(FEATURES)
    on = [name for name, switch in switches.items() if switch.on]
    assert list(Settings().features) == on
    plan = predict(config(), lora_rank=0, completion=4 * TILE_ROWS)
    assert plan.settings["features"] == on
    # What is off unless asked for is not counted on
    everything = predict(config(), lora_rank=0, completion=4 * TILE_ROWS, features=FEATURES)
    assert everything.moments["backward"]["one layer"] < plan.moments["backward"]["one layer"]


def test_a_little_cache_stands_beside_what_torch_keeps() -> None:
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128_256}
    model = config("LlamaConfig", num_attention_heads=32, num_key_value_heads=8, head_dim=128, **large)
    little = predict(model, group=8, prompt=128, completion=64, lora_rank=0)  # as in grpo_8b_full
    trained = little.phase_bytes("training")
    assert trained is not None
    assert little.phase_bytes("rollout") == trained > 0
    assert little.largest_part()[0] != "rollout"
    much = predict(model, group=64, prompt=128, completion=4096, lora_rank=0)
    assert BY_TORCH not in much.moments["rollout"]


def test_settings_move_the_parts_that_they_are_for() -> None:
    base = {"prompt": 16, "completion": 512, "micro_batch": 8}

    def part(name: str, moment: str = "backward", **settings: Any) -> int:
        return predict(config(), **{**base, **settings}).moments[moment].get(name, 0)

    assert part("optimizer", optimizer="adamw_8bit") < part("optimizer") / 3
    assert part("optimizer", optimizer="paged_adamw_8bit") == 0
    assert part("other models") == 0
    assert part("other models", lora_rank=0, beta=0.1) == part("weights")
    # Two layers: one input beside the one in use, wherever it waits; more layers, and all but two wait on the host
    assert part("layer inputs", features=("logprob",)) == part("layer inputs", features=("checkpointing",))
    deep = config(num_hidden_layers=12)
    inputs = [predict(deep, **base, features=f).moments["backward"]["layer inputs"] for f in ((), ("checkpointing",))]
    assert inputs[0] * 2 == inputs[1] * 11
    assert part("attention mask", padded=True, features=("logprob",)) > 0
    assert part("attention mask", padded=True, features=("logprob", "packing")) == 0
    assert part("logits", "scoring", features=()) > part("loss tiles", "scoring")
    assert part("activations", gradient_checkpointing=False) > part("layer inputs")
    assert part("KV cache", "rollout") > 0
    assert part("KV cache", "rollout", vllm=False) == 0
    assert part("engine's weights", "rollout", features=("logprob",)) == part("weights")
    packed = predict(config(), **base, features=("packing",)).moments["backward"]["one layer"]
    assert packed < predict(config(), **base, features=()).moments["backward"]["one layer"]


@pytest.mark.parametrize("trainer", ["grpo", "rloo", "dpo", "online_dpo", "ppo"])
def test_table_and_dict_say_the_same(trainer: str) -> None:
    plan = predict(config(), trainer=trainer, prompt=16, completion=64, gpu_bytes=8 << 30)
    data = json.loads(json.dumps(plan.to_dict()))
    assert data == plan.to_dict()
    assert data["totals"] == {moment: sum(parts.values()) for moment, parts in data["moments"].items()}
    assert ("rollout" in data["moments"]) == (trainer != "dpo")
    for part in {part for parts in plan.moments.values() for part in parts}:
        assert part in str(plan)
    moment, part = plan.largest_part()
    assert part in REMEDIES
    assert plan.total(moment) == plan.peak_bytes
    assert plan.phase_bytes("training") == max(plan.total("scoring"), plan.total("backward"))


def test_remedy_is_one_setting_that_is_not_set_yet() -> None:
    """A feature that is off where turning it on spares most of the part, and otherwise a number of the script's."""
    every = tuple(name for name in FEATURES if name != "mlp_tiling")

    def told(part: str, moment: str = "backward", **settings: Any) -> str:
        made = {"prompt": 16, "completion": 512, "micro_batch": 8, **settings}
        return predict(config(num_hidden_layers=12), **made).remedy(moment, part)

    def without(*names: str) -> tuple[str, ...]:
        return tuple(name for name in every if name not in names)

    assert told("one layer", features=without("lora")).startswith("set patch(lora=True), ")
    assert told("one layer", features=without("norms")).startswith("set patch(norms=True), ")
    assert told("one layer") == "lower per_device_train_batch_size"
    assert told("one layer", micro_batch=1) == "lower max_completion_length"
    # An MLP with adapters that is made again has tiles of its own, and without, one of few rows has none
    assert told("one layer", completion=4096) == "lower per_device_train_batch_size"
    tiled = {"completion": 4096, "lora_rank": 0}
    assert told("one layer", **tiled).startswith("set patch(mlp_tiling=True), ")
    assert told("one layer", **tiled, gradient_checkpointing=False) == "lower per_device_train_batch_size"
    assert told("one layer", lora_rank=0) == "lower per_device_train_batch_size"
    assert told("layer inputs", features=without("checkpointing")).startswith("set patch(checkpointing=True), ")
    assert told("layer inputs") == "lower per_device_train_batch_size"
    assert told("loss tiles", "scoring") == "lower per_device_train_batch_size"
    assert told("logits", "scoring", features=without("logprob")).startswith("set patch(logprob=True), ")
    masked = {"features": without("packing", "attention"), "padded": True}
    assert told("attention mask", **masked).startswith("set patch(attention=True), ")
    assert told("KV cache", "rollout") == "lower max_completion_length"
    assert told("KV cache", "rollout", trainer="online_dpo") == "lower max_new_tokens"
    assert told("loss tiles", "scoring", trainer="dpo", micro_batch=1) == "lower max_length"
    assert told("sampling", "rollout", trainer="ppo") == "lower local_rollout_forward_batch_size"
    assert told("gradients", lora_rank=0) == "train a LoRA adapter (peft_config)"
    assert told("gradients") == "lower the adapter's rank"
    assert told("optimizer") == "set optim='adamw_8bit'"
    assert told("optimizer", optimizer="adamw_8bit") == "lower the adapter's rank"


@pytest.mark.parametrize("trainer", ["grpo", "rloo", "dpo", "online_dpo", "ppo"])
@pytest.mark.parametrize("features", [(), None])
def test_every_part_with_a_remedy_has_one_sentence(trainer: str, features: Any) -> None:
    plan = predict(config(), trainer=trainer, features=features, padded=True, beta=0.1)
    for moment, parts in plan.moments.items():
        for part in parts.keys() & REMEDIES.keys():
            said = plan.remedy(moment, part)
            assert said
            assert not [word for word in (" or ", " and ", "{") if word in said], said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trainer": "sft"}, "no plan for the trainer 'sft'"),
        ({"features": ["fast"]}, "'fast' is no feature"),
        ({"completion": 0}, "completion is 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        predict(config(), **settings)


def test_what_is_not_counted_is_said() -> None:
    experts = transformers.Qwen3MoeConfig(
        vocab_size=211, hidden_size=64, num_hidden_layers=2, num_experts=4, moe_intermediate_size=32, head_dim=16
    )
    assert any("experts" in note for note in predict(experts).notes)
    assert not predict(config()).notes
    assert any("full logits" in note for note in predict(config(), features=()).notes)


def test_a_model_without_layers() -> None:
    class Odd(nn.Module):
        config = config()

    with pytest.raises(ValueError, match="no list of 2 layers"):
        model_sizes.of_model(Odd())
