"""What a trainer wants scored, and the scope in which a model's forward answers it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from trl_turbo.report import note

IGNORED = -100

# input_ids [B, L], attention_mask [B, L] or None -> the token each position is asked about [B, L], -100 for none
Targets = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Request:
    """One kind of scoring pass.

    Attributes:
        targets: Which token each position is asked about; `None` where the model is called with labels.
        temperature: What the trainer divides the logits by.
        outputs: Statistics to take, names of `trl_turbo.kernels.linear_logprob.OUTPUTS`.
        entropy_grad: Whether gradients flow through the entropy.
        in_fp32: Whether the projection runs in float32 outside autocast.
        answered: Filled with the name of each model class that answered; empty means that nobody did.
    """

    targets: Targets | None = None
    temperature: float = 1.0
    outputs: tuple[str, ...] = ("logps",)
    entropy_grad: bool = False
    in_fp32: bool = False
    answered: list[str] = field(default_factory=list)


# Whether the loss that is being computed differentiates the entropy. Unknown callers are assumed to.
_ENTROPY_GRADIENT: ContextVar[bool] = ContextVar("trl_turbo_entropy_gradient", default=True)
_ACTIVE: ContextVar[Request | None] = ContextVar("trl_turbo_scoring", default=None)


def active_request() -> Request | None:
    """What the trainer around this call wants, or `None`."""
    return _ACTIVE.get()


@contextmanager
def scoring(request: Request) -> Iterator[Request]:
    """Within this scope the causal language models of this thread answer `request` instead of returning logits."""
    token = _ACTIVE.set(request)
    try:
        yield request
    finally:
        _ACTIVE.reset(token)


def entropy_has_gradient() -> bool:
    """Whether the loss around this call differentiates the entropy, as far as it said."""
    return _ENTROPY_GRADIENT.get()


@contextmanager
def entropy_gradient(differentiated: bool) -> Iterator[None]:
    """Within this scope the loss does, or does not, differentiate the entropy."""
    token = _ENTROPY_GRADIENT.set(differentiated)
    try:
        yield
    finally:
        _ENTROPY_GRADIENT.reset(token)


def next_token(labels: torch.Tensor) -> torch.Tensor:
    """Labels `[B, L]` in the usual sense (each the token itself) as targets `[B, L]` (each the token after)."""
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    return targets


def completion_targets(keep: int, masked: bool = True) -> Targets:
    """The last `keep` tokens of each row, those under a zero of the attention mask left out where `masked`."""

    def targets(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        labels = input_ids.clone()
        if masked and attention_mask is not None:
            labels.masked_fill_(attention_mask == 0, IGNORED)
        if keep >= input_ids.size(1):
            return labels  # no prompt at all: TRL then pairs each token with the logits of its own position
        labels[:, : input_ids.size(1) - keep] = IGNORED
        return next_token(labels)

    return targets


def masked_targets(labels: torch.Tensor, mask: torch.Tensor) -> Targets:
    """Fixed `labels` `[B, L]`, only where `mask` `[B, L]` is not zero."""
    fixed = next_token(labels.masked_fill(mask == 0, IGNORED))
    return lambda *_: fixed


def left_to_trl(trainer: Any) -> bool:
    """Whether the parameters are sharded in a way that TRL's own path is used for; the report then says so."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if not getattr(trainer, "is_fsdp_enabled", False) or getattr(plugin, "fsdp_version", 1) == 2:
        return False
    name = type(trainer).__name__
    note(
        "logprob",
        f"{name}: the parameters are sharded by FSDP in its first version; TRL's own path is used, with full logits "
        "(fsdp_version: 2 in accelerate's configuration keeps the kernels)",
    )
    return True
