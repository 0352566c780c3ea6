"""The truth, in plain torch."""

from __future__ import annotations

import torch

from .spec import Rotation, Step


def paged_decode_reference(step: Step) -> torch.Tensor:
    """See `op.paged_decode`; in float64 where the query is, which the function itself does not take."""
    query, key, value, key_cache, value_cache, block_table, seq_lens, slots, scale, rotation, window, softcap = step
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if rotation is not None:
        query, key = (_rotated(x.to(wide), rotation).to(x.dtype) for x in (query, key))
    block = key_cache.shape[1]
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            key_cache[slot // block, slot % block] = key[row]
            value_cache[slot // block, slot % block] = value[row]
    out = torch.zeros_like(query)
    groups = query.shape[1] // key.shape[1]
    for row, length in enumerate(seq_lens.tolist()):
        if not length:
            continue
        at = torch.arange(0 if window is None else max(0, length - window), length, device=query.device)
        blocks = block_table[row, at // block].long()
        k, v = (cache[blocks, at % block].to(wide).clone() for cache in (key_cache, value_cache))
        k[-1], v[-1] = key[row].to(wide), value[row].to(wide)
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("hd,thd->ht", query[row].to(wide), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), v).to(query.dtype)
    return out


def _rotated(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    width = rotation.cos_sin.shape[1]
    cos, sin = rotation.cos_sin[rotation.positions.long()].to(x.dtype).unsqueeze(1).chunk(2, dim=-1)
    turned, rest = x[..., :width], x[..., width:]
    if rotation.interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((pairs.flatten(-2), rest), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
