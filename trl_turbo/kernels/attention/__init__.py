"""A stand-in for the attention kernel: its interface in plain torch, until the kernel itself is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Segments:
    """A packed row of T tokens: segments one after another, some of them preceded by another one, their prefix."""

    lengths: tuple[int, ...]
    prefix: tuple[int, ...]
    positions: torch.Tensor  # int64 [T]

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        prefix: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Segments:
        """Lay out segments of `lengths` tokens; `prefix` names the one before each, or -1."""
        prefix = [-1] * len(lengths) if prefix is None else prefix
        shifts = [0 if p < 0 else lengths[p] for p in prefix]
        parts = [torch.arange(n) + shift for n, shift in zip(lengths, shifts, strict=True)]
        positions = torch.cat([torch.zeros(0, dtype=torch.int64), *parts]).to(device or "cpu")
        return cls(tuple(lengths), tuple(prefix), positions)

    @property
    def total(self) -> int:
        """T, the tokens of all segments."""
        return self.positions.shape[0]


def attention(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,  # noqa: ARG001
) -> torch.Tensor:
    """Causal attention over the segments and their prefixes, [T, Hq, D]."""
    sizes = torch.tensor(segments.lengths, device=q.device)
    of = torch.arange(len(sizes), device=q.device).repeat_interleave(sizes)  # the segment of each token
    before = torch.tensor(segments.prefix, device=q.device)[of]
    at = segments.positions
    mask = (of[:, None] == of[None, :]) | (before[:, None] == of[None, :])
    mask &= at[:, None] >= at[None, :]
    if window is not None:
        mask &= at[:, None] - at[None, :] < window
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1).transpose(0, 1).float() for x in (k, v))
    scores = q.transpose(0, 1).float() @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).to(q.dtype)
