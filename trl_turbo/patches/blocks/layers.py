"""Decoder layers: the sum that attention's residual makes, and the norm over it, in one pass.

A norm's own forward is not told of the residual: the layer adds it before, in code of its own. So a layer's forward is
replaced where it is norm, attention, sum, norm, MLP, sum, as in Llama, and nothing more: with parts that stand in for
its own it must compute that, and hand on to attention what it is called with.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn

from trl_turbo.compat.sharded import own_class
from trl_turbo.kernels.rms_norm import add_rms_norm
from trl_turbo.patches.blocks import norms
from trl_turbo.patches.blocks.agreement import RAISED, choose, generator
from trl_turbo.patches.blocks.classes import (
    Forward,
    State,
    Verdicts,
    adopt_classes,
    adopted,
    runs_plainly,
    stand_in,
)
from trl_turbo.patches.blocks.norms import NormForm

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
#: What transformers 4.57 to 5 call a layer with beside its input; all of it goes to attention.
_KNOWN = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
    "position_embeddings",
}
_ROWS, _WIDTH = 128, 64
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def adopt(model: nn.Module) -> None:
    """Let the classes of `model`'s decoder layers add and norm in one pass where that computes what they do."""
    adopt_classes(_layers(model), LayerVerdicts, make_forward, lambda module: module.post_attention_layernorm.weight)


class LayerVerdicts(Verdicts[NormForm]):
    """Which form of `rms_norm` stands behind attention, in layers that are otherwise as expected."""

    feature = "norms"

    def mark(self, module: Any) -> Hashable:
        """The norm's."""
        norm = module._modules["post_attention_layernorm"]
        return norms.weight_of(norm).dtype, norms.eps_of(norm)

    def traits(self, module: Any) -> Hashable:
        """Both norms' classes, too."""
        return self.mark(module), norms.eps_of(module.input_layernorm), *map(own_class, _both(module))

    def decide(self, module: Any, state: State) -> tuple[NormForm | None, str]:
        """The second norm's form, where the layer is norm, attention, sum, norm, MLP and sum."""
        others = sorted(_parameters(self.original) - _KNOWN)
        if others:
            return None, f"takes {', '.join(others)}, which is not known"
        reason = self._otherwise(module, state, routed=False)
        if reason is None and (reason := self._otherwise(module, state, routed=True)) is not None:
            # Layers of no experts have no word for a router's answer, and never get one
            reason = None if reason.startswith(RAISED) else reason
        if reason is not None:
            return None, reason
        norm = module.post_attention_layernorm
        asked = adopted(own_class(norm), self.feature)
        return (None, "has a norm that is not ours") if asked is None else asked.answer(norm, state)

    def _otherwise(self, module: Any, state: State, *, routed: bool) -> str | None:
        """Why a layer with other parts in it, an MLP that answers with its router's among them, is of another form."""
        given = {name: object() for name in _parameters(self.original) - {"past_key_values", "use_cache"}}
        handed: list[dict[str, Any]] = []

        def original(x: torch.Tensor) -> Any:
            parts = _stand_ins(routed)
            out = self.original(stand_in(module, **parts), x, **given)
            handed.append(parts["self_attn"].given)
            return out

        def ours(x: torch.Tensor) -> torch.Tensor:
            parts = _stand_ins(routed)
            total = parts["self_attn"](hidden_states=parts["input_layernorm"](x))[0] + x
            return total + _first(parts["mlp"](parts["post_attention_layernorm"](total)))

        x = torch.randn(2, _ROWS // 2, _WIDTH, generator=generator()).to(state.device, state.dtype)
        same, reason = choose(original, {True: ours}, [x], differentiable=1)
        if same is None:
            return reason
        if any(words != _handed_on(self.original, given) for words in handed):
            return "does not hand all that it is called with to attention"
        return None


def make_forward(original: Forward) -> Forward:
    """Wrap a decoder layer's forward so that attention's residual is added by the norm that follows."""
    verdicts = LayerVerdicts(original)
    defaults = _handed_on(original, {})

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else kwargs.get("hidden_states")
        if len(args) > 1 or "past_key_value" in kwargs or not runs_plainly(x):
            return original(self, *args, **kwargs)
        parts = self._modules
        norm = parts["post_attention_layernorm"]
        weight = norms.weight_of(norm)
        own = vars(norm)
        if not runs_plainly(weight) or weight.device != x.device or weight.shape != x.shape[-1:] or _hooked(own):
            return original(self, *args, **kwargs)
        form = verdicts.form(self, State.of(self, x))
        if form is None:
            return original(self, *args, **kwargs)
        given = defaults | kwargs
        given["hidden_states"] = parts["input_layernorm"](x)
        attended = parts["self_attn"](**given)[0]
        if attended.dtype == x.dtype and attended.shape == x.shape:
            normed, total = add_rms_norm(
                attended, x, weight, norms.eps_of(norm), offset=form.offset, scale_in_float32=form.scale_in_float32
            )
        else:
            total = x + attended
            normed = norm(total)
        return total + _first(parts["mlp"](normed))

    forward.__dict__["verdicts"] = verdicts
    return forward


def _first(answer: Any) -> Any:
    """An MLP's output, without its router's."""
    return answer[0] if isinstance(answer, tuple) else answer


def _stand_ins(routed: bool) -> dict[str, Any]:
    """A layer's parts: each computes something else, and does so without a kernel of ours."""
    return {
        "input_layernorm": _Part(lambda x: x * torch.sigmoid(x)),
        "self_attn": _Attention(),
        "post_attention_layernorm": _Part(lambda x: x - torch.tanh(x)),
        "mlp": _Part(lambda x: (torch.cos(x) * x, x) if routed else torch.cos(x) * x),
    }


class _Part(nn.Module):
    """Computes a function of its input."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self._function(x)


class _Attention(nn.Module):
    """Takes its input by name, as attention does, and keeps what else it is called with."""

    given: dict[str, Any]

    def forward(self, *, hidden_states: torch.Tensor, **given: Any) -> tuple[torch.Tensor, None]:
        self.given = given
        return torch.sin(hidden_states), None


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules of two norms, an attention and an MLP, and nothing else."""
    known = {id(norm) for norm in norms.norms_of(model)}
    for module in model.modules():
        if module._modules.keys() != _PARTS or any(module.parameters(recurse=False)):
            continue
        if all(id(norm) in known for norm in _both(module)):
            yield module


def _both(module: Any) -> tuple[Any, Any]:
    return module.input_layernorm, module.post_attention_layernorm


def _parameters(forward: Forward) -> set[str]:
    """What a layer's forward takes by name beside itself and its input."""
    found = inspect.signature(forward).parameters.values()
    return {each.name for each in found if each.kind is not each.VAR_KEYWORD} - {"self", "hidden_states"}


def _handed_on(forward: Forward, given: dict[str, Any]) -> dict[str, Any]:
    """What attention gets of what a layer is called with: all of it, and the defaults of the rest."""
    parameters = inspect.signature(forward).parameters
    return {name: parameters[name].default for name in _parameters(forward)} | given


def _hooked(own: dict[str, Any]) -> bool:
    """Whether calling a module runs more than the forward of its class, which a sum in its norm would not."""
    return "forward" in own or any(own[kind] for kind in _HOOKS)
