"""What norms and MLPs have in common: a class's forward is replaced once, and asks for each module whether it may."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trl_turbo.compat.sharded import own_class
from trl_turbo.patches.blocks.agreement import autocast_dtype, judge
from trl_turbo.patching import Replacement, extend, replacement_of
from trl_turbo.report import note

Form = TypeVar("Form")
Forward = Callable[..., Any]

_PLAIN = (bool, int, float, str)
_TENSORS = (torch.Tensor, nn.Parameter)
# Somebody else's kernels, by the package that their functions and classes come from
_OTHERS = {"liger_kernel": "Liger's", "unsloth": "Unsloth's"}


class State(NamedTuple):
    """What a module is called in, as far as that decides what it computes."""

    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    training: bool

    @classmethod
    def of(cls, module: nn.Module, x: torch.Tensor) -> State:
        """The state of a call of `module` with `x` [..., D]."""
        return cls(x.dtype, x.device, autocast_dtype(x.device), module.training)

    def __str__(self) -> str:
        words = f"in {str(self.dtype).removeprefix('torch.')} on {self.device.type}"
        return words if self.autocast is None else f"{words} under autocast"


class Verdicts(ABC, Generic[Form]):
    """Which form of ours the modules of one class may run, found out once for each configuration and state.

    The answer for a module is kept while the module lives; a copy of it, or another one that is configured alike,
    shares what was found out.

    Args:
        original: The class's own forward.
    """

    feature: str

    def __init__(self, original: Forward) -> None:
        self.original = original
        self._of_module: WeakKeyDictionary[nn.Module, dict[Hashable, Form | None]] = WeakKeyDictionary()
        self._of_kind: dict[Hashable, tuple[Form | None, str]] = {}
        self._kept: list[Any] = []  # configurations whose id is in a key

    @abstractmethod
    def decide(self, module: Any, state: State) -> tuple[Form | None, str]:
        """Find the form for a module in a state, or why there is none."""

    @abstractmethod
    def mark(self, module: Any) -> Hashable:
        """What else than the state may change between two calls of one module; cheap."""

    def traits(self, module: Any) -> Hashable:
        """What two modules of one class must share beside their plain attributes to compute the same."""
        return self.mark(module)

    def form(self, module: nn.Module, state: State) -> Form | None:
        """The form for a call in this state, or `None` where the original must run; noted the first time."""
        known = self._of_module.get(module)
        if known is None:
            known = self._of_module[module] = {}
        key = (state, self.mark(module))
        if key not in known:
            if state.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None
            form, reason = self.answer(module, state)
            if form is None:
                say(self.feature, type(module), f"{state} {reason}")
            known[key] = form
        return known[key]

    def answer(self, module: Any, state: State) -> tuple[Form | None, str]:
        """The form for modules configured like this one, or why there is none."""
        config = getattr(module, "config", None)
        kind = (own_class(module), plain_attributes(module), id(config), state, self.traits(module))
        if kind not in self._of_kind:
            self._kept.append(config)
            self._of_kind[kind] = judge(lambda: self.decide(module, state), state.device, state.autocast)
        return self._of_kind[kind]


def adopt_classes(
    modules: Iterable[nn.Module],
    verdicts: type[Verdicts[Any]],
    make_forward: Callable[[Forward], Forward],
    sample: Callable[[Any], torch.Tensor],
) -> None:
    """Replace the forward of each class among `modules` that computes what we have an op for; note why others stay.

    Args:
        modules: Modules of a structure that the feature knows.
        verdicts: The feature's.
        make_forward: Makes the replacement of a class's forward; its result has the attribute `verdicts`.
        sample: A tensor of a module, in the dtype and on the device that it runs in.
    """
    feature = verdicts.feature
    judges: dict[type, Verdicts[Any]] = {}
    for module in modules:
        kind = own_class(module)
        reason = _taken(module) or unreachable(*module.parameters())
        if reason is None:
            ours = _adopted(kind, feature)
            if ours is None and runs_our_lora(kind):
                continue  # it was there first, and has all of the module in one function
            asked = ours or judges.setdefault(kind, verdicts(_raw_forward(kind)))
            form, reason = asked.answer(module, State.of(module, sample(module)))
            if form is not None:
                reason = None
                if ours is None:
                    extend(f"{feature}.models", Replacement(kind, "forward", make_forward))
        if reason is not None:
            say(feature, kind, reason)


def say(feature: str, kind: type, reason: str) -> None:
    """Note that modules of a class stay as they are."""
    note(feature, f"{kind.__module__.rpartition('.')[2]}.{kind.__name__} {reason}; it stays as it is")


def unreachable(*tensors: torch.Tensor) -> str | None:
    """Why nothing can be computed with these parameters, or `None`."""
    for tensor in tensors:
        if tensor.is_meta:
            return "has parameters on the meta device"
    return None


def runs_plainly(x: Any) -> bool:
    """Whether a tensor in a forward is one that our ops take: no DTensor, no fake, nothing that a compiler traces."""
    return type(x) in _TENSORS and x.is_floating_point() and not x.is_meta and not torch.compiler.is_compiling()


def other_kernels(thing: Any) -> str | None:
    """Whose kernels a function or class is, where it is somebody else's, as ``"Liger's"``."""
    for layer in (thing, inspect.unwrap(thing)):
        package = str(getattr(layer, "__module__", "")).partition(".")[0]
        if package in _OTHERS:
            return _OTHERS[package]
    return None


def plain_attributes(module: Any) -> tuple[tuple[str, Any], ...]:
    """The numbers, flags and words that a module was configured with."""
    own = getattr(module, "__dict__", {})
    skipped = ("training", "layer_idx")
    return tuple((k, v) for k, v in own.items() if type(v) in _PLAIN and k[0] != "_" and k not in skipped)


def stand_in(module: Any, **parts: Any) -> Any:
    """A copy of a module with some of its parameters and submodules replaced, sharing all else."""
    copied = object.__new__(type(module))
    copied.__dict__.update(vars(module))
    parameters, modules = dict(module._parameters), dict(module._modules)
    for name, part in parts.items():
        (modules if isinstance(part, nn.Module) else parameters)[name] = part
    copied.__dict__.update(_parameters=parameters, _modules=modules)
    return copied


def only_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one tensor that a forward of one argument was called with, or `None`."""
    if len(args) + len(kwargs) != 1:
        return None
    return args[0] if args else next(iter(kwargs.values()))


def _taken(module: nn.Module) -> str | None:
    """Why a module's forward is not its class's own, or `None`."""
    own = vars(module).get("forward")
    if own is not None:
        whose = other_kernels(own)
        return f"runs {whose} forward" if whose else "has a forward of its own on the instance"
    whose = other_kernels(type(module)) or other_kernels(_raw_forward(type(module)))
    return None if whose is None else f"is {whose} already"


def _raw_forward(kind: type) -> Forward:
    return next(vars(scope)["forward"] for scope in kind.__mro__ if "forward" in vars(scope))


def _adopted(kind: type, feature: str) -> Any:
    """The verdicts of a class whose forward we have replaced, or inherits one that we have."""
    for target in _chain(kind):
        found = getattr(target, "verdicts", None)
        if isinstance(found, Verdicts) and found.feature == feature:
            return found
    return None


def runs_our_lora(kind: type) -> bool:
    """Whether a class's forward is, or calls, the one that our LoRA feature gave it."""
    return any(_is_of_lora(target) for target in _chain(kind))


def _is_of_lora(target: Any) -> bool:
    return getattr(target, "__globals__", {}).get("__name__", "").startswith("trl_turbo.patches.lora.")


def _chain(kind: type) -> Iterator[Any]:
    """What a class's forward calls, from the outermost wrapper down."""
    function: Any = _raw_forward(kind)
    for _ in range(16):  # a chain is a few wrappers long
        target = replacement_of(function) or function
        yield target
        function = getattr(target, "__wrapped__", None)
        if function is None:
            return
