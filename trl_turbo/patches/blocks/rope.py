"""The rotary embedding: the function `apply_rotary_pos_emb` of a model's file, where it computes what ours does."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Hashable
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from trl_turbo.compat.sharded import own_class
from trl_turbo.kernels.rope import rope
from trl_turbo.patches.blocks.agreement import autocast_dtype, choose, generator, judge
from trl_turbo.patches.blocks.classes import other_kernels, runs_plainly, unreachable
from trl_turbo.patching import Replacement, extend, replacement_of
from trl_turbo.report import note

NAME = "apply_rotary_pos_emb"
_FORMS = "trl_turbo_forms"
_FIRST = ("q", "k", "cos", "sin")
_HEADS = (4, 2)
_LENGTH = 48


class RopeForm(NamedTuple):
    """How a model's function relates to `rope`.

    Attributes:
        interleaved: Whether pairs are side by side.
        from_halves: Whether it takes the first half of the angles' columns, each twice (GLM), not them as they are.
        exact: Whether it computes in float32 what it rounds to 16 bits at last, with angles in 16 bits (Cohere).
        widens: Whether it answers in the angles' dtype where that is wider (float32 angles of a model under autocast).
    """

    interleaved: bool
    from_halves: bool = False
    exact: bool = False
    widens: bool = False

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn q [B, H, T, D] and k [B, Hk, T, D] by cos and sin [B or 1, T, R]."""
        if self.from_halves:
            cos, sin = (x[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1) for x in (cos, sin))
        if self.exact:
            cos, sin = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (cos, sin))
        if self.widens:
            wide = torch.promote_types(q.dtype, cos.dtype)
            q, k = q.to(wide), k.to(wide)
        return rope(q, k, cos, sin, interleaved=self.interleaved)


FORMS = (RopeForm(False), RopeForm(True), RopeForm(True, from_halves=True))


class Angles(NamedTuple):
    """What a call is made of, as far as that decides what is computed."""

    q: torch.dtype
    cos: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    width: int
    rotary: int


def adopt(model: nn.Module) -> None:
    """Let the files that `model`'s classes come from run our op where their function computes what it does."""
    widths = {width for module in model.modules() if isinstance(width := getattr(module, "head_dim", None), int)}
    parameter = next((p for p in model.parameters() if p.is_floating_point() and p.element_size() > 1), None)
    if parameter is None:
        return
    for file in dict.fromkeys(sys.modules.get(own_class(module).__module__) for module in model.modules()):
        function = getattr(file, NAME, None)
        if file is None or function is None or _FORMS in vars(replacement_of(function) or function):
            continue
        reason = _unfit(function) or unreachable(parameter)
        if reason is None:
            reason = _try(function, parameter, min(widths, default=64))
            if reason is None:
                extend("rope.models", Replacement(file, NAME, functools.partial(make_function, file)))
        if reason is not None:
            _say(file, reason)


def make_function(file: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a model's function so that it runs `rope` in the form that was found to be its own."""
    forms: dict[Hashable, RopeForm | None] = {}
    signature = _signature(original)
    # Of a module, `wraps` would take over what it has registered
    alike = functools.wraps(original) if isinstance(original, FunctionType) else lambda function: function

    @alike
    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = (q, k, cos, sin)
        if not all(map(runs_plainly, tensors)) or not _takes(tensors) or not _usual(signature, args, kwargs):
            return original(q, k, cos, sin, *args, **kwargs)
        if _has_hub_kernel(original):  # of another model in this process
            return original(q, k, cos, sin, *args, **kwargs)
        key = Angles(q.dtype, cos.dtype, q.device, autocast_dtype(q.device), q.shape[-1], cos.shape[-1])
        if key not in forms:
            if q.is_cuda and torch.cuda.is_current_stream_capturing():
                return original(q, k, cos, sin, *args, **kwargs)
            forms[key], reason = _find(original, key)
            if reason:
                dtype = str(q.dtype).removeprefix("torch.")
                _say(file, f"in {dtype}, {key.rotary} of {key.width} columns, {reason}")
        form = forms[key]
        return original(q, k, cos, sin, *args, **kwargs) if form is None else form(q, k, cos, sin)

    apply_rotary_pos_emb.__dict__[_FORMS] = forms
    return apply_rotary_pos_emb


def _takes(tensors: tuple[torch.Tensor, ...]) -> bool:
    q, k, cos, sin = tensors
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or cos.dtype != sin.dtype:
        return False
    batch, _, length, width = q.shape
    return (
        (k.shape[0], *k.shape[2:]) == (batch, length, width)
        and q.dtype == k.dtype
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == length
        and cos.shape[2] <= width
        and cos.shape[2] % 2 == 0
        and not cos.requires_grad
        and not sin.requires_grad
        and len({x.device for x in tensors}) == 1
    )


def _usual(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether all that is passed beside the four tensors is what the function has as its default."""
    if not args and not kwargs:
        return True
    given = signature.bind(None, None, None, None, *args, **kwargs).arguments
    rest = [name for name in signature.parameters if name not in _FIRST and name in given]
    defaults = [signature.parameters[name].default for name in rest]
    return all(
        type(given[name]) is type(default) and given[name] == default
        for name, default in zip(rest, defaults, strict=True)
    )


def _unfit(function: Any) -> str | None:
    whose = other_kernels(function)
    if whose is not None or _has_hub_kernel(function):
        return f"is {whose or 'a hub kernel'} already"
    if not isinstance(function, (FunctionType, nn.Module)):
        return f"is a {type(function).__name__}"
    parameters = list(_signature(function).parameters.values())
    if tuple(p.name for p in parameters[:4]) != _FIRST or any(_must_be_given(p) for p in parameters[4:]):
        return f"takes ({', '.join(p.name for p in parameters)})"
    return None


def _must_be_given(parameter: inspect.Parameter) -> bool:
    rest = (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and parameter.kind not in rest


def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function.forward if isinstance(function, nn.Module) else function)


def _has_hub_kernel(function: Any) -> bool:
    """Where the package `kernels` is installed, transformers 5 makes the function a module, which may get a kernel."""
    return isinstance(function, nn.Module) and "forward" in vars(function)


def _try(function: Callable[..., Any], parameter: torch.Tensor, width: int) -> str | None:
    """Why the function must stay in the model's dtype, or `None` where it fits the whole head or half of it."""
    width += width % 4
    reasons = []
    for rotary in (width, width // 2):
        key = Angles(parameter.dtype, parameter.dtype, parameter.device, None, width, rotary)
        form, reason = _find(function, key)
        if form is not None:
            return None
        reasons.append(reason)
    return reasons[0]


def _find(function: Callable[..., Any], key: Angles) -> tuple[RopeForm | None, str]:
    return judge(lambda: _decide(function, key), key.device, key.autocast)


def _decide(function: Callable[..., Any], key: Angles) -> tuple[RopeForm | None, str]:
    """The form that agrees with the function, for angles that have nothing in common from column to column."""
    numbers = generator()
    q, k = (torch.randn(2, heads, _LENGTH, key.width, generator=numbers) for heads in _HEADS)
    turns = 6 * torch.rand(2, _LENGTH, key.rotary, generator=numbers)
    inputs = [x.to(key.device, key.q) for x in (q, k)]
    inputs += [angles(turns).to(key.device, key.cos) for angles in (torch.cos, torch.sin)]
    forms = list(FORMS)
    if key.cos.itemsize < torch.float32.itemsize:
        forms += [form._replace(exact=True) for form in FORMS]
    if torch.promote_types(key.q, key.cos) != key.q:
        forms += [form._replace(widens=True) for form in FORMS]
    return choose(function, {form: form.__call__ for form in forms}, inputs, differentiable=2)


def _say(file: ModuleType, reason: str) -> None:
    note("rope", f"{file.__name__.rpartition('.')[2]}.{NAME} {reason}; it stays as it is")
