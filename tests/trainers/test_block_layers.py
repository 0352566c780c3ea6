"""Decoder layers that add attention's residual and norm it in one pass: which, and that all else goes on as it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import trl_turbo

from .block_models import WITH_RESIDUAL, make, tokens
from .test_blocks import notes, planted, prepared

#: Of two layers each; Gemma 2 and 3 norm what attention gives, Phi's have a dropout there, and Cohere's are parallel.
ADDS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "gemma-erf"), 2),
    **dict.fromkeys(("gemma2", "gemma3-text", "phi3", "glm4", "cohere"), 0),
}


def adds(output: torch.Tensor) -> int:
    """How many norms in the graph behind an output add a residual."""
    names: Counter[str] = Counter()
    queue, seen = [output.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names[type(node).__name__] += 1
            queue += [there for there, _ in node.next_functions]
    return names[WITH_RESIDUAL]


@pytest.mark.parametrize("name", ADDS)
def test_layers_of_real_models(name: str) -> None:
    model = prepared(make(name, torch.bfloat16), "norms")
    assert adds(model(input_ids=tokens()).logits) == ADDS[name]
    assert len(notes()) == (name == "cohere"), notes()  # of its norms
    trl_turbo.unpatch()
    assert adds(model(input_ids=tokens()).logits) == 0


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 16))
        self.eps = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def forward(self, hidden_states: torch.Tensor, scale: Any = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
        self.given = kwargs
        return hidden_states.cumsum(1), None


class Mlp(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 16, bias=False)


class Layer(nn.Module):
    """Llama's, whose steps are given."""

    def __init__(self, steps: Callable[..., Any]) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.steps = steps

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        use_cache: bool = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        kwargs |= {
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "position_embeddings": position_embeddings,
        }
        return self.steps(self, hidden_states, kwargs)


def steps(self: Any, x: torch.Tensor, kwargs: dict[str, Any], share: float = 1.0) -> torch.Tensor:
    x = x + share * self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)[0]
    return x + self.mlp(self.post_attention_layernorm(x))


def without_mask(self: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    return steps(self, x, {**kwargs, "attention_mask": None})


def parallel(self: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    attended = self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)[0]
    return x + attended + self.mlp(self.post_attention_layernorm(x))


def with_router(self: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> Any:
    """As Mixtral's once: what the router says comes out of the layer, too."""
    x = x + self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)[0]
    answer = self.mlp(self.post_attention_layernorm(x))
    return (x + answer[0], answer[1]) if isinstance(answer, tuple) else x + answer


OTHERS: dict[str, tuple[Callable[..., Any], str]] = {
    "half of attention": (lambda self, x, kw: steps(self, x, kw, 0.5), "computes something else"),
    "the MLP beside attention": (parallel, "computes something else"),
    "a mask that stays behind": (without_mask, "does not hand all that it is called with to attention"),
    "a second result": (lambda self, x, kw: (steps(self, x, kw), x), "returns another number of tensors"),
    "a router's answer": (with_router, "returns another number of tensors"),
    "attention by position": (
        lambda self, x, kw: x + self.self_attn(self.input_layernorm(x), **kw)[0],
        "on random input raised TypeError",
    ),
}


@pytest.mark.parametrize("name", ["as in Llama", *OTHERS])
def test_layers_are_adopted_by_what_they_compute(name: str) -> None:
    form, reason = OTHERS.get(name, (steps, ""))
    model = planted(Layer, form)
    forward, x = type(model[0]).forward, torch.randn(2, 5, 16)
    stock = model[0](x)
    prepared(model, "norms")
    out = model[0](x)
    good = name == "as in Llama"
    assert (type(model[0]).forward is forward) != good
    first, plain = (y[0] if isinstance(y, tuple) else y for y in (out, stock))
    assert adds(first) == good
    torch.testing.assert_close(first, plain)
    assert [n for n in notes() if "Planted" in n and reason in n] if reason else not notes(), notes()


class Routed(Layer):
    def forward(self, hidden_states: torch.Tensor, output_router_logits: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        return self.steps(self, hidden_states, kwargs)


def test_a_parameter_that_is_not_known() -> None:
    prepared(planted(Routed, steps), "norms")
    assert [n for n in notes() if "Planted takes output_router_logits, which is not known" in n], notes()


def first_of_both(self: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """As Qwen3-MoE's in transformers 4."""
    x = x + self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)[0]
    answer = self.mlp(self.post_attention_layernorm(x))
    return x + (answer[0] if isinstance(answer, tuple) else answer)


def test_a_router_that_answers_beside_its_mlp() -> None:
    layer, x = prepared(planted(Layer, first_of_both), "norms")[0], torch.randn(2, 5, 16)
    plain = layer(x)
    mlp = layer.mlp.forward
    layer.mlp.forward = lambda x: (mlp(x), x)
    routed = layer(x)
    assert adds(routed) == 1
    torch.testing.assert_close(routed, plain)


def test_attention_gets_what_the_layer_is_called_with() -> None:
    model = prepared(planted(Layer, steps), "norms")
    layer, x, mask, more = model[0], torch.randn(2, 5, 16), object(), object()
    by_name = layer(hidden_states=x, attention_mask=mask, more=more)
    assert layer.self_attn.given == {
        "attention_mask": mask,
        "use_cache": False,
        "position_embeddings": None,
        "more": more,
    }
    assert adds(by_name) == 1
    by_position = layer(x, mask)  # runs as it was written
    assert layer.self_attn.given["attention_mask"] is mask
    assert adds(by_position) == 0
    torch.testing.assert_close(by_position, by_name)


@pytest.mark.parametrize("kind", ["hook", "forward"])
def test_a_norm_that_does_more_is_called(kind: str) -> None:
    model = prepared(planted(Layer, steps), "norms")
    norm, seen = model[0].post_attention_layernorm, []
    x = torch.randn(2, 5, 16)
    if kind == "hook":
        norm.register_forward_hook(lambda *_: seen.append(1))
    else:
        norm.forward = lambda x: [seen.append(1), x][1]
    assert adds(model[0](x)) == 0
    assert seen


def test_an_attention_of_another_dtype() -> None:
    """Its sum with the residual is in what both promote to, as torch has it."""
    model = planted(Layer, steps)
    x = torch.randn(2, 5, 16)
    layer = prepared(model, "norms")[0]

    def attend(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.bfloat16(), None

    layer.self_attn.forward = attend
    out = layer(x)
    assert adds(out) == 0
    assert out.dtype == torch.float32
