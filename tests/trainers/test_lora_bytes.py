"""What a decoder layer with LoRA keeps for backward, in bytes: at least 40 % less than stock, and no more than now.

Counted with `saved_tensors_hooks`: each storage once, parameters and what is cast from frozen ones left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

import trl_turbo
from trl_turbo.patches.lora.models import hook_model

from .lora_models import ALL, patched
from .models import ALONE

HIDDEN, INNER, TOKENS, RANK = 96, 560, 80, 8  # the proportions of Qwen2.5-1.5B
#: Bytes of the whole layer, norms and attention included
LAYER = 318_720


def one_layer_model(adapter: torch.dtype, dropout: float = 0.0) -> Any:
    """A model of one decoder layer over a bf16 base."""
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    lora = LoraConfig(r=RANK, target_modules=ALL, init_lora_weights=False, lora_dropout=dropout)
    peft = get_peft_model(model, lora).train()
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    return peft


def kept_bytes(model: Any, call: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes that `call` keeps for backward beyond parameters, casts of frozen ones and its own inputs."""
    skipped = {p.untyped_storage().data_ptr() for p in model.parameters()}
    skipped |= {x.untyped_storage().data_ptr() for x in inputs}
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in skipped and tuple(tensor.shape) not in shapes:
            found[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    del y
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def parts(model: Any) -> dict[str, Callable[[torch.Tensor], Any]]:
    """The MLP, the projections of attention and its output, as the model calls them."""
    layer = model.base_model.model.model.layers[0]
    attention = layer.self_attn
    return {
        "mlp": layer.mlp,
        "qkv": lambda x: (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)),
        "o": attention.o_proj,
    }


def measured(adapter: torch.dtype, dropout: float, model: Any = None) -> dict[str, int]:
    model = model or one_layer_model(adapter, dropout)
    found = {}
    with torch.autocast("cpu", torch.bfloat16):
        for name, part in parts(model).items():
            x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
            found[name] = kept_bytes(model, lambda part=part, x=x: part(x), (x,))
        inner = model.base_model.model.model
        x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        where = inner.rotary_emb(x, torch.arange(TOKENS)[None])
        found["layer"] = kept_bytes(model, lambda: inner.layers[0](x, position_embeddings=where), (x, *where))
    return found


NARROW = TOKENS * RANK * 2
#: x of a part is its caller's; the narrow side of each adapter is kept, and gate and up
NOW = {"mlp": 2 * TOKENS * INNER * 2 + 3 * NARROW, "qkv": 3 * NARROW, "o": NARROW}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_bytes(adapter: torch.dtype, dropout: float) -> None:
    stock = measured(adapter, dropout)
    model = one_layer_model(adapter, dropout)
    with patched(model) as ran:
        found = measured(adapter, dropout, model)
    assert ran["mlp"] == 2
    assert {name: found[name] for name in NOW} == NOW
    # Adapters in the base's dtype without dropout: stock, too, keeps x as it is, and only the MLP keeps less
    same = adapter == torch.bfloat16 and not dropout
    for name in ("mlp", *(() if same else ("qkv", "o", "layer"))):
        assert found[name] <= 0.6 * stock[name], (name, found[name], stock[name])
    for name, count in found.items():
        assert count <= stock[name], name
    assert found["layer"] <= LAYER, "a decoder layer keeps more than it did"


def test_layer_with_adapters_in_the_bases_dtype_is_40_percent_under_with_its_norms() -> None:
    """The norms are another feature: stock's keep their input in float32."""
    from trl_turbo.patches.blocks.models import adopt

    stock = measured(torch.bfloat16, 0.0)
    model = one_layer_model(torch.bfloat16)
    trl_turbo.patch(**{**ALONE, "lora": True, "norms": True}, strict=True, verbose=False)
    hook_model(model)
    adopt("norms", model)
    assert measured(torch.bfloat16, 0.0, model)["layer"] <= 0.6 * stock["layer"]
