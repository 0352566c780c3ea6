"""Plain torch where no kernel serves: segments of nearly one length, behind prefixes of one length, are a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

from .reference import attend
from .segments import Segments
from .spec import Spec, wide

#: The least that a segment fills of its batch's rows, and the most scores of a head that a batch of several has.
_FILLED, _SCORES = 0.75, 1 << 22


class Batch(NamedTuple):
    """Segments that are attended together.

    Attributes:
        rows: int64 [B, L], tokens of each, the last one again where there are no more: nobody before it sees it twice.
        keys: int64 [B, M], tokens of the prefix that the first query's window reaches.
        kept: int64, which of the B * L results are of tokens, in order.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    kept: torch.Tensor


def attention_in_batches(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    segments: Segments,
    spec: Spec,
) -> torch.Tensor:
    """The attention [T, Hq, D] of `reference`, through torch's own; differentiable by autograd."""
    if segments.total == 0:
        return q * k.sum() * v.sum()  # of the right shape, and on the tape
    if torch.compiler.is_compiling():  # whose tensors must not be kept
        batches, back = _batches(segments, spec.window)
    else:
        batches, back = segments.cached(("batches", spec.window), lambda: _batches(segments, spec.window))
    # Gradients of a prefix come from each segment that follows it, and are added up in float32
    wide_k, wide_v = (x.to(wide(x.dtype)) if any(b.keys.shape[1] for b in batches) else x for x in (k, v))
    results = []
    for rows, keys, kept in batches:
        own_k, own_v = _gathered(k, rows), _gathered(v, rows)
        if keys.shape[1]:
            own_k = torch.cat((_gathered(wide_k, keys).to(k.dtype), own_k), 2)
            own_v = torch.cat((_gathered(wide_v, keys).to(v.dtype), own_v), 2)
        o = _attend(_gathered(q, rows), own_k, own_v, spec)
        results.append(o.transpose(1, 2).flatten(0, 1).index_select(0, kept))
    return torch.cat(results).index_select(0, back)


def _gathered(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows [B, L] of x [T, H, D], as [B, H, L, D]. The gradient of `index_select` is no loop over single elements."""
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)


def _attend(
    q: torch.Tensor,  # [B, Hq, L, D]
    k: torch.Tensor,  # [B, Hkv, M + L, D]
    v: torch.Tensor,  # [B, Hkv, M + L, D]
    spec: Spec,
) -> torch.Tensor:
    length, total = q.shape[2], k.shape[2]
    gqa: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    windowed = spec.window is not None and spec.window < total
    if spec.softcap is None and length == total and not windowed:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, **gqa)
    distance = torch.arange(total - length, total, device=q.device)[:, None] - torch.arange(total, device=q.device)
    mask = distance >= 0
    if windowed:
        mask &= distance < spec.window  # type: ignore[operator]
    if spec.softcap is None:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale, **gqa)
    return attend(q, k, v, mask, spec)


def _batches(segments: Segments, window: int | None) -> tuple[list[Batch], torch.Tensor]:
    """The batches, and for each token its place among their results."""
    there = [i for i, length in enumerate(segments.lengths) if length]
    order = sorted(there, key=lambda i: (segments.before(i), -segments.lengths[i]))
    groups: list[list[int]] = []
    for i in order:
        length, before = segments.lengths[i], segments.before(i)
        if groups:
            longest = segments.lengths[groups[-1][0]]
            fits = (len(groups[-1]) + 1) * longest * (longest + before) <= _SCORES
            if segments.before(groups[-1][0]) == before and length >= _FILLED * longest and fits:
                groups[-1].append(i)
                continue
        groups.append([i])
    batches = [_batch(segments, group, window) for group in groups]
    order_of_results = torch.cat([batch.rows.flatten()[batch.kept] for batch in batches])
    back = torch.empty_like(order_of_results)
    back[order_of_results] = torch.arange(len(back), device=back.device)
    return batches, back


def _batch(segments: Segments, group: list[int], window: int | None) -> Batch:
    device = segments.device
    lengths = torch.tensor([segments.lengths[i] for i in group], device=device)[:, None]
    starts = torch.tensor([segments.starts[i] for i in group], device=device)[:, None]
    index = torch.arange(segments.lengths[group[0]], device=device)[None, :]
    rows = starts + torch.minimum(index, lengths - 1)
    before = segments.before(group[0])
    first = 0 if window is None else min(before, max(0, before + 1 - window))
    prefixes = torch.tensor([segments.starts[max(segments.prefix[i], 0)] for i in group], device=device)[:, None]
    keys = prefixes + torch.arange(first, before, device=device)[None, :]
    return Batch(rows, keys, (index < lengths).flatten().nonzero().flatten())
