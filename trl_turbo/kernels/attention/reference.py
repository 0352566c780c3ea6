"""The truth in plain torch, from the whole [T, T] mask; and plain torch by segment, for where no kernel serves."""

from __future__ import annotations

import torch
from torch.nn import functional

from .segments import Segments
from .spec import Spec, wide


def mask_of(segments: Segments, window: int | None) -> torch.Tensor:
    """Which key each query sees, bool [T, T]."""
    count = torch.arange(len(segments.lengths))
    segment = count.repeat_interleave(torch.tensor(segments.lengths, dtype=torch.int64)).to(segments.device)
    prefix = torch.tensor(segments.prefix, dtype=torch.int64, device=segments.device)[segment]
    distance = segments.positions[:, None] - segments.positions[None, :]
    seen = (segment[:, None] == segment[None, :]) & (distance >= 0)
    seen |= prefix[:, None] == segment[None, :]
    return seen if window is None else seen & (distance < window)


def attention_reference(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    segments: Segments,
    spec: Spec,
) -> torch.Tensor:
    """Attention [T, Hq, D] in the dtype of its inputs, the softmax in float32 (float64 for float64) as in eager code.

    Differentiable by autograd. In a low precision it is the yardstick that the kernels' error is measured with.
    """
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return attend(q, k, v, mask_of(segments, spec.window), spec).transpose(0, 1)


def attend(
    q: torch.Tensor,  # [Hq, N, D]
    k: torch.Tensor,  # [Hkv, M, D]
    v: torch.Tensor,  # [Hkv, M, D]
    mask: torch.Tensor,  # [N, M] bool
    spec: Spec,
) -> torch.Tensor:
    """Attention [Hq, N, D] of queries to the keys that `mask` lets them see, by plain torch."""
    groups = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=wide(q.dtype)).to(q.dtype)
    return weights @ v


def attention_by_segment(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    segments: Segments,
    spec: Spec,
) -> torch.Tensor:
    """The same [T, Hq, D], with torch's own attention a segment; what is in memory at once is one segment's at most.

    Differentiable by autograd.
    """
    if segments.total == 0:
        return q * k.sum() * v.sum()  # of the right shape, and on the tape
    # One split, whose backward is one concatenation: a slice's is a [T, H, D] of zeros for each segment
    queries, keys, values = (x.transpose(0, 1).split(list(segments.lengths), 1) for x in (q, k, v))
    # Gradients of a prefix come from each segment that follows it, and are added up in float32
    shared = {p: (keys[p].to(wide(k.dtype)), values[p].to(wide(v.dtype))) for p in set(segments.prefix) if p >= 0}
    outputs = []
    for i, prefix in enumerate(segments.prefix):
        if segments.lengths[i] == 0:
            continue
        before = segments.before(i)
        key, value = keys[i], values[i]
        if before:
            # Of the prefix, what the first query's window reaches
            first = 0 if spec.window is None else max(0, before + 1 - spec.window)
            key, value = (
                torch.cat((x[:, first:].to(own.dtype), own), 1)
                for x, own in zip(shared[prefix], (key, value), strict=True)
            )
            before -= first
        outputs.append(_one(queries[i], key, value, before, spec))
    return torch.cat(outputs, 1).transpose(0, 1)


def _one(
    q: torch.Tensor,  # [Hq, N, D]
    k: torch.Tensor,  # [Hkv, M + N, D]
    v: torch.Tensor,  # [Hkv, M + N, D]
    before: int,
    spec: Spec,
) -> torch.Tensor:
    length, window = q.shape[1], spec.window
    causal = before == 0 and (window is None or window >= length)
    if causal and spec.softcap is None:
        return _sdpa(q, k, v, spec, is_causal=True)
    at = torch.arange(before, before + length, device=q.device)[:, None]
    other = torch.arange(before + length, device=q.device)[None, :]
    mask = at >= other
    if window is not None:
        mask &= at - other < window
    if spec.softcap is None:
        return _sdpa(q, k, v, spec, attn_mask=mask)
    return attend(q, k, v, mask, spec)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec, **kwargs: object) -> torch.Tensor:
    gqa = {"enable_gqa": True} if q.shape[0] != k.shape[0] else {}
    return functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=spec.scale, **kwargs, **gqa)[0]  # type: ignore[arg-type]
