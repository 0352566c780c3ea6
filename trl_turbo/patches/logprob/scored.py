# ruff: noqa: D102, ARG002 -- the methods are those of torch.Tensor, and mean the same
"""What a trainer sees in place of logits: the statistics it is going to ask for, already known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trl_turbo.patches.logprob.pending import ADVICE, UnsupportedLogitsOp, refusing, scalar
from trl_turbo.patches.logprob.request import IGNORED

# What `cross_entropy` means where it is a mean over positions that all count
_PLAIN_MEAN = {
    "weight": None,
    "size_average": None,
    "ignore_index": -100,
    "reduce": None,
    "reduction": "mean",
    "label_smoothing": 0.0,
}


@refusing("`logits.{}` needs the logits themselves, which are never made; " + ADVICE + ".")
class ScoredLogits:
    """Logits of which only the statistics exist, for positions `[B, T]` and their known targets.

    Args:
        stats: Statistics by name, each `[B, T]`: `targets`, `log_probs` and any of `entropy`, `logsumexp`,
            `logsumexp2`, `mean_logits`, `is_top1`.
        temperature: What the statistics assume the logits are divided by in the end.
        vocab: Size of the last dimension that is pretended.
        divisor: What the caller divided by so far.
    """

    def __init__(
        self,
        stats: dict[str, torch.Tensor],
        temperature: float,
        vocab: int,
        divisor: float = 1.0,
        doubled: bool = False,
    ) -> None:
        self.stats = stats
        self.temperature = temperature
        self.vocab = vocab
        self.divisor = divisor
        self.doubled = doubled

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ScoredLogits:
        stats = {name: change(value) for name, value in self.stats.items()}
        return ScoredLogits(stats, self.temperature, self.vocab, self.divisor, self.doubled)

    def _get(self, name: str) -> torch.Tensor:
        # The statistics were taken at one temperature; answering for another would be silently wrong
        if abs(self.divisor - self.temperature) > 1e-6 * self.temperature:
            raise UnsupportedLogitsOp(
                f"log-probabilities were computed at temperature {self.temperature}, but the trainer divided the "
                f"logits by {self.divisor}; {ADVICE}."
            )
        if self.doubled and name != "logsumexp2":
            raise UnsupportedLogitsOp(f"`{name}` of doubled logits is not kept; {ADVICE}.")
        if name not in self.stats:
            raise UnsupportedLogitsOp(f"the statistic `{name}` was not asked of the fused head; {ADVICE}.")
        return self.stats[name]

    # What trainers ask -------------------------------------------------------------------------------------------
    def log_probs_of(self, index: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[B, T]` of the known targets; NaN where `index` `[B, T]` names another token."""
        log_probs = self._get("log_probs")
        if index.shape != log_probs.shape:
            raise UnsupportedLogitsOp(
                f"log-probabilities of shape {tuple(index.shape)} were asked where the fused head scored "
                f"{tuple(log_probs.shape)}; {ADVICE}."
            )
        targets = self.stats["targets"]
        # Another token than the one that was scored has no known value. NaN says so without waiting for the device
        known = (index == targets) | (targets == IGNORED)
        return torch.where(known, log_probs, torch.nan)

    def entropy(self) -> torch.Tensor:
        """Entropy `[B, T]` of each next-token distribution, in nats."""
        return self._get("entropy")

    def expected_logit(self) -> torch.Tensor:
        """Mean logit `[B, T]` under the distribution itself: `logsumexp - entropy`."""
        return self._get("logsumexp") - self._get("entropy")

    # How trainers get there --------------------------------------------------------------------------------------
    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.stats["log_probs"].shape, self.vocab))

    @property
    def ndim(self) -> int:
        return self.stats["log_probs"].ndim + 1

    @property
    def dtype(self) -> torch.dtype:
        return self.stats["log_probs"].dtype

    @property
    def device(self) -> torch.device:
        return self.stats["log_probs"].device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> ScoredLogits:
        parts = index if isinstance(index, tuple) else (index,)
        rank = self.ndim
        if Ellipsis in [part for part in parts if not isinstance(part, torch.Tensor)]:
            at = next(i for i, part in enumerate(parts) if part is Ellipsis)
            fill = rank - (len(parts) - 1)
            parts = parts[:at] + (slice(None),) * fill + parts[at + 1 :]
        used = sum(part.dim() if _is_mask(part) else 1 for part in parts)
        if used == rank:
            if not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
                raise UnsupportedLogitsOp(f"single logits of the vocabulary were indexed; {ADVICE}.")
            parts = parts[:-1]
        return self._map(lambda value: value[parts])

    def contiguous(self) -> ScoredLogits:
        return self

    def float(self) -> ScoredLogits:
        return self

    def to(self, *args: Any, **kwargs: Any) -> ScoredLogits:
        return self

    def detach(self) -> ScoredLogits:
        return self._map(torch.Tensor.detach)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[ScoredLogits, ...]:
        if dim not in (0, 1):
            raise UnsupportedLogitsOp(f"the logits were split along the vocabulary; {ADVICE}.")
        split = {name: value.chunk(chunks, dim) for name, value in self.stats.items()}
        count = len(split["log_probs"])
        return tuple(
            ScoredLogits({n: v[i] for n, v in split.items()}, self.temperature, self.vocab, self.divisor, self.doubled)
            for i in range(count)
        )

    def _scaled(self, factor: Any) -> ScoredLogits:
        if factor == 2.0 and not self.doubled and "logsumexp2" in self.stats:
            return ScoredLogits(self.stats, self.temperature, self.vocab, self.divisor, doubled=True)
        return ScoredLogits(self.stats, self.temperature, self.vocab, self.divisor / factor, self.doubled)

    def __truediv__(self, other: Any) -> ScoredLogits:
        return ScoredLogits(self.stats, self.temperature, self.vocab, self.divisor * scalar(other), self.doubled)

    __itruediv__ = __truediv__
    div = __truediv__

    def div_(self, other: Any) -> ScoredLogits:
        """In place, as GRPO and RLOO of TRL 1.4 to 1.9 divide by the temperature."""
        self.divisor *= scalar(other)
        return self

    def __mul__(self, other: Any) -> ScoredLogits:
        return self._scaled(scalar(other))

    __rmul__ = __mul__

    def mean(self, dim: int = -1) -> torch.Tensor:
        _last(dim, self.ndim, "mean")
        return self._get("mean_logits")

    def argmax(self, dim: int = -1) -> torch.Tensor:
        """The target where it is the most likely token, -1 elsewhere: all that a comparison with the target needs."""
        _last(dim, self.ndim, "argmax")
        return torch.where(self._get("is_top1"), self.stats["targets"], -1)

    def log_softmax(self, dim: int = -1) -> ScoredLogProbs:
        _last(dim, self.ndim, "log_softmax")
        return ScoredLogProbs(self)

    def logsumexp(self, dim: int = -1) -> torch.Tensor:
        _last(dim, self.ndim, "logsumexp")
        return self._get("logsumexp2" if self.doubled else "logsumexp")

    def softmax(self, dim: int = -1) -> ScoredProbs:
        _last(dim, self.ndim, "softmax")
        return ScoredProbs(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedLogitsOp(f"`logits.{name}` needs the logits themselves, which are never made; {ADVICE}.")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, cls):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            if func is torch.logsumexp:
                return first.logsumexp(dim)
            if func in (torch.softmax, torch.nn.functional.softmax):
                return first.softmax(dim)
            if func in (torch.log_softmax, torch.nn.functional.log_softmax):
                return first.log_softmax(dim)
            if func is torch.argmax:
                return first.argmax(dim)
            # torch hands on the arguments that were not given too
            if func is torch.nn.functional.cross_entropy and len(args) == 2 and kwargs.items() <= _PLAIN_MEAN.items():
                return -first.log_probs_of(args[1]).mean()
        raise UnsupportedLogitsOp(
            f"`{getattr(func, '__name__', func)}` needs the logits themselves, which are never made; {ADVICE}."
        )


class ScoredLogProbs:
    """`log_softmax` of `ScoredLogits`: only the known targets can be taken out of it."""

    def __init__(self, logits: ScoredLogits) -> None:
        self.logits = logits

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.take_along_dim, torch.gather) and isinstance(args[0], cls):
            given = (*args[1:], *kwargs.values())
            index = next(value for value in given if isinstance(value, torch.Tensor))
            return args[0].logits.log_probs_of(index.squeeze(-1)).unsqueeze(-1)
        raise UnsupportedLogitsOp(
            f"`{getattr(func, '__name__', func)}` of all log-probabilities needs the logits themselves; {ADVICE}."
        )


class ScoredProbs:
    """`softmax` of `ScoredLogits`: its product with these logits may be summed over the vocabulary, nothing else."""

    def __init__(self, logits: ScoredLogits, weighted: bool = False) -> None:
        self.logits = logits
        self.weighted = weighted

    def __mul__(self, other: Any) -> ScoredProbs:
        if not isinstance(other, ScoredLogits) or other.stats is not self.logits.stats or self.weighted:
            raise UnsupportedLogitsOp(f"probabilities may only be weighted by their own logits; {ADVICE}.")
        return ScoredProbs(self.logits, weighted=True)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.sum and isinstance(args[0], cls) and args[0].weighted:
            return args[0].logits.expected_logit()
        raise UnsupportedLogitsOp(
            f"`{getattr(func, '__name__', func)}` of all probabilities needs the logits themselves; {ADVICE}."
        )


def _is_mask(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype == torch.bool


def _last(dim: int, rank: int, name: str) -> None:
    if dim not in (-1, rank - 1):
        raise UnsupportedLogitsOp(f"`{name}` over dimension {dim} needs the logits themselves; {ADVICE}.")
