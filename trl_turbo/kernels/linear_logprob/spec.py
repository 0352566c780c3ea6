"""What can be asked of `linear_logprob`, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

OUTPUTS: tuple[str, ...] = ("logps", "entropy", "logsumexp", "logsumexp2", "mean_logit", "top1")


class LinearLogprobOutput(NamedTuple):
    """Per-row statistics of the logits z, `None` where not asked for; float32 (float64 for float64 inputs)."""

    logps: torch.Tensor | None = None  # [N] z[target] - logsumexp(z); carries gradients
    entropy: torch.Tensor | None = None  # [N] of softmax(z); carries gradients when asked to
    logsumexp: torch.Tensor | None = None  # [N] logsumexp(z); no gradient
    logsumexp2: torch.Tensor | None = None  # [N] logsumexp(2 z); no gradient
    mean_logit: torch.Tensor | None = None  # [N] mean of z over the vocabulary; no gradient
    top1: torch.Tensor | None = None  # [N] bool: the target is argmax(z), the first one on a tie


@dataclass(frozen=True)
class Transform:
    """z = softcap * tanh(logit_scale * x / softcap) / temperature; without a softcap, logit_scale * x / temperature."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def slope(self) -> float:
        """dz/dx where the softcap is far away."""
        return self.logit_scale / self.temperature


@dataclass(frozen=True)
class Spec:
    """Everything about a call that is not a tensor."""

    transform: Transform
    outputs: tuple[str, ...]
    entropy_grad: bool
    byte_budget: int | None
    compute_dtype: torch.dtype

    @property
    def stats_dtype(self) -> torch.dtype:
        """float64 inputs keep float64 statistics (for gradient checks); everything else is summed in float32."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32
