# ruff: noqa: D102, ARG002 -- the methods are those of torch.Tensor, and mean the same
"""Logits on their way out of a model whose head was intercepted: never made, only described."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

ADVICE = "call trl_turbo.patch(logprob=False) or set TRL_TURBO_LOGPROB=0 to keep TRL's own path"


class UnsupportedLogitsOp(NotImplementedError):  # noqa: N818 -- names what was met
    """Something was asked of the logits that cannot be answered without making them."""


# What a tensor can do and a stand-in cannot: without these Python raises a TypeError, which reads like a script's bug
_OPERATORS = (
    *("add", "radd", "sub", "rsub", "neg", "abs", "pow", "rtruediv", "matmul", "rmatmul", "float"),
    *("lt", "le", "gt", "ge", "setitem", "iter", "len", "invert"),
)


def refusing(sentence: str) -> Callable[[type], type]:
    """Class decorator: every operator of a tensor that the class does not define raises `UnsupportedLogitsOp`."""

    def refused(name: str) -> Callable[..., Any]:
        def operator(*_: Any) -> Any:
            raise UnsupportedLogitsOp(sentence.format(name))

        return operator

    def decorate(cls: type) -> type:
        for name in (f"__{operator}__" for operator in _OPERATORS):
            if name not in vars(cls):
                setattr(cls, name, refused(name))
        return cls

    return decorate


@refusing("the model uses `logits.{}`")
class PendingLogits:
    """The output of an intercepted head: the hidden states, and what the model did to the logits since.

    Only elementwise steps that the fused kernel knows are recorded: products, quotients, one tanh between them, casts.
    """

    def __init__(self, hidden: torch.Tensor, vocab: int, before: float = 1.0, after: float | None = None) -> None:
        self.hidden = hidden  # [..., H]
        self.vocab = vocab
        self._before = before  # factor before the tanh
        self._after = after  # factor after it; None: no tanh yet

    def of(self, hidden: torch.Tensor) -> PendingLogits:
        """The same of other hidden states."""
        return PendingLogits(hidden, self.vocab, self._before, self._after)

    @property
    def softcap(self) -> float | None:
        return self._after

    @property
    def logit_scale(self) -> float:
        """Factor of the projection inside `softcap * tanh(scale * x / softcap)`, or of the projection alone."""
        return self._before if self._after is None else self._before * self._after

    def _times(self, factor: float) -> PendingLogits:
        if self._after is None:
            return PendingLogits(self.hidden, self.vocab, self._before * factor)
        return PendingLogits(self.hidden, self.vocab, self._before, self._after * factor)

    def _tanh(self) -> PendingLogits:
        if self._after is not None:
            raise UnsupportedLogitsOp("the model applies tanh to its logits twice")
        return PendingLogits(self.hidden, self.vocab, self._before, 1.0)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.vocab))

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def float(self) -> PendingLogits:
        return self

    def to(self, *args: Any, **kwargs: Any) -> PendingLogits:
        return self

    def contiguous(self) -> PendingLogits:
        return self

    def tanh(self) -> PendingLogits:
        return self._tanh()

    def __mul__(self, other: Any) -> PendingLogits:
        return self._times(scalar(other))

    __rmul__ = __mul__
    __imul__ = __mul__
    mul = __mul__

    def __truediv__(self, other: Any) -> PendingLogits:
        return self._times(1.0 / scalar(other))

    __itruediv__ = __truediv__
    div = __truediv__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what it is, not what it says: FSDP2 asks so before it casts a unit's output
            raise AttributeError(name)
        raise UnsupportedLogitsOp(f"the model uses `logits.{name}`")

    def __getitem__(self, index: Any) -> Any:
        raise UnsupportedLogitsOp("the model indexes its logits")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.tanh, torch.Tensor.tanh) and len(args) == 1 and isinstance(args[0], cls):
            return args[0]._tanh()
        if func in (torch.mul, torch.Tensor.mul, torch.Tensor.__rmul__) and not kwargs:
            left, right = args
            return left * right if isinstance(left, cls) else right * left
        if func in (torch.div, torch.true_divide) and not kwargs and isinstance(args[0], cls):
            return args[0] / args[1]
        raise UnsupportedLogitsOp(f"the model applies `{getattr(func, '__name__', func)}` to its logits")


def scalar(value: Any) -> float:
    """A number out of whatever logits were combined with; raises `UnsupportedLogitsOp` where it is none."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.requires_grad:
        return float(value)
    raise UnsupportedLogitsOp(f"the model combines its logits with a {type(value).__name__}")
