"""What a model is made of, as far as that decides its memory; read off its modules, with no table of models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Linear:
    """One projection of a layer.

    Attributes:
        inputs: Width of what it takes.
        outputs: Width of what it gives.
        rank: Of the adapter over it; 0 without one.
    """

    inputs: int
    outputs: int
    rank: int = 0

    @property
    def adapter_parameters(self) -> int:
        """Numbers in both matrices of its adapter."""
        return self.rank * (self.inputs + self.outputs)


@dataclass(frozen=True)
class Sizes:
    """A causal language model.

    Attributes:
        config: Its text configuration.
        layers: How many layers.
        hidden: H.
        vocab: V.
        heads: A, width of all queries together.
        kv: Width of all keys together.
        queries: Number of query heads.
        norms: What each norm of a layer takes, in elements a token.
        groups: The linears of a layer by the module that they are in: the last one of each takes what that module made,
            the others the module's input.
        inner: Width of one half of the gated MLP; 0 where the layer has none, or several.
        experts: Whether it has several.
        weight_bytes: The base model, scales of 4-bit weights included.
        head_bytes: The output head's own part of that; 0 where it is the embedding.
        trainable: Numbers that the optimizer updates.
        trainable_bytes: What they take.
        adapter_bytes: Adapters, trained or not.
        itemsize: Bytes of an activation.
        packed: Whether linears are stored in 4 bits.
    """

    config: Any
    layers: int
    hidden: int
    vocab: int
    heads: int
    kv: int
    queries: int
    norms: tuple[int, ...]
    groups: tuple[tuple[Linear, ...], ...]
    inner: int
    experts: bool
    weight_bytes: int
    head_bytes: int
    trainable: int
    trainable_bytes: int
    adapter_bytes: int
    itemsize: int
    packed: bool

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears of one layer."""
        return tuple(linear for group in self.groups for linear in group)

    @property
    def has_adapters(self) -> bool:
        """Whether there are adapters."""
        return self.adapter_bytes > 0

    @property
    def adapter_itemsize(self) -> int:
        """Bytes of one number of an adapter; that of activations where there is none."""
        numbers = self.layers * sum(linear.adapter_parameters for linear in self.linears)
        return max(1, round(self.adapter_bytes / numbers)) if numbers else self.itemsize

    @property
    def largest_linear(self) -> int:
        """Numbers of the largest weight of a layer."""
        return max((linear.inputs * linear.outputs for linear in self.linears), default=0)


# Double-quantised nf4: half a byte, one byte of scale to 64 numbers, and 4 bytes of a scale's scale to 256 of those
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def of_config(config: Any, *, rank: int = 0, load_in_4bit: bool = False, itemsize: int = 2) -> Sizes:
    """Sizes of the model of a configuration, as a script would load it; no weight is loaded or allocated.

    Args:
        config: transformers' configuration.
        rank: Of LoRA adapters on every linear but the head; 0 trains all weights.
        load_in_4bit: Whether linears but the head are double-quantised nf4; adapters are then kept in 16 bits, as TRL
            casts them.
        itemsize: Bytes of a weight and of an activation.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plain = of_model(model)
    groups = tuple(tuple(replace(linear, rank=rank) for linear in group) for group in plain.groups)
    total = sum(p.numel() for p in model.parameters())
    inside = sum(m.weight.numel() for layer in _layers(model) for m in layer.modules() if isinstance(m, nn.Linear))
    weights = (total - inside) * itemsize + inside * (NF4_BYTES if load_in_4bit else itemsize)
    adapters = plain.layers * sum(linear.adapter_parameters for group in groups for linear in group)
    # PEFT keeps adapters in float32 over a 16-bit base
    adapter_bytes = adapters * (2 if load_in_4bit else 4)
    return replace(
        plain,
        groups=groups,
        weight_bytes=int(weights),
        head_bytes=plain.head_bytes * itemsize // _itemsize(model),
        trainable=adapters or total,
        trainable_bytes=adapter_bytes or int(weights),
        adapter_bytes=adapter_bytes,
        itemsize=itemsize,
        packed=load_in_4bit,
    )


def of_model(model: Any) -> Sizes:
    """Sizes of a model that exists, adapters and all.

    Args:
        model: A causal language model; wrappers are seen through.

    Raises:
        ValueError: It has no list of layers.
    """
    # PEFT's wrapper, through which the head and the configuration are found as well
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = base.config.get_text_config()
    layers = _layers(base)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    heads, kv = text.num_attention_heads * head_dim, kv_heads * head_dim
    layer = max(layers, key=lambda found: sum(p.numel() for p in found.parameters()))
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    own = {id(p) for p in adapters}
    weights = [p for p in model.parameters() if id(p) not in own]
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = list(_groups(layer))
    mlps = [found for name, found in groups if _is_mlp(name, found, text.hidden_size)]
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is None or getattr(head, "weight", None) is getattr(embedding, "weight", None)
    return Sizes(
        config=text,
        layers=len(layers),
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        heads=heads,
        kv=kv,
        queries=text.num_attention_heads,
        norms=tuple(_norms(layer, head_dim, (heads, kv))),
        groups=tuple(group for _, group in groups),
        inner=mlps[0][-1].inputs if len(mlps) == 1 else 0,  # several are experts, which not every token passes
        experts=len(mlps) > 1,
        weight_bytes=sum(_nbytes(p) for p in weights),
        head_bytes=0 if tied or head is None else sum(_nbytes(p) for p in head.parameters()),
        trainable=sum(p.numel() for p in trained),
        trainable_bytes=sum(map(_nbytes, trained)),
        adapter_bytes=sum(map(_nbytes, adapters)),
        itemsize=_itemsize(base),
        packed=any(hasattr(p, "quant_state") for p in weights),
    )


def _layers(model: Any) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of {count} layers, from which its memory could be read")
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def _norms(layer: nn.Module, head_dim: int, of_heads: tuple[int, int]) -> Iterator[int]:
    """Elements a token of each norm: a norm of heads runs over all of them, queries first."""
    left = list(of_heads)
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 1 or any(True for _ in module.children()):
            continue
        yield left.pop(0) if weight.numel() == head_dim and left else weight.numel()


def _groups(module: nn.Module, name: str = "") -> Iterator[tuple[str, tuple[Linear, ...]]]:
    """The linears in each module, and the module's name."""
    found = []
    for own, child in module.named_children():
        if hasattr(child, "in_features") and hasattr(child, "out_features"):
            ranks = getattr(child, "r", None)  # PEFT's
            rank = sum(ranks.values()) if isinstance(ranks, dict) else 0
            found.append(Linear(int(child.in_features), int(child.out_features), rank))  # type: ignore[arg-type]
        else:
            yield from _groups(child, f"{name}.{own}")
    if found:
        yield name, tuple(found)


def _is_mlp(name: str, linears: tuple[Linear, ...], hidden: int) -> bool:
    """Whether linears are a gated MLP's: two halves from the hidden size, side by side or one, and back."""
    *firsts, last = linears
    wide = sum(linear.outputs for linear in firsts)
    return "att" not in name and last.outputs == hidden and wide == 2 * last.inputs


def _nbytes(parameter: Any) -> int:
    own = parameter.numel() * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return own
    parts = [state.absmax, *((state.state2.absmax,) if state.nested else ())]
    return own + sum(part.numel() * part.element_size() for part in parts)


def _itemsize(model: Any) -> int:
    """Bytes of an activation: of the embedding, since the rest may be stored in 4 bits."""
    return model.get_input_embeddings().weight.element_size()
