"""Our attention of a decode step on random numbers, before a graph captures it: it may not run on every GPU."""

from __future__ import annotations

from typing import Any

import torch

from trl_turbo.engine.decode_batch import first_line
from trl_turbo.kernels.paged_attention import Rotation, Step, paged_decode
from trl_turbo.kernels.paged_attention.reference import paged_decode_reference

_LENGTHS = (5, 200)
_BLOCK = 16


def misbehaves(layer: Any, device: torch.device) -> str | None:
    """Say what is wrong with the kernel on a device, for the heads of a layer of vLLM's, or return `None`."""
    try:
        off, bound = _apart(layer, device)
    except Exception as error:  # whatever a compiler or a driver says
        return f"it does not run on this device ({first_line(error)})"
    return None if off <= bound else f"on random numbers it is off by {off:.2g} on this device, of {bound:.2g}"


def _apart(layer: Any, device: torch.device) -> tuple[float, float]:
    """How far the kernel is from float64, and how far it may be."""
    generator = torch.Generator(device).manual_seed(0)  # the trainer's random numbers stay as they are
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(layer.dtype)

    rows, blocks = len(_LENGTHS), -(-max(_LENGTHS) // _BLOCK)
    query, key, value = normal(rows, heads, dim), normal(rows, kv_heads, dim), normal(rows, kv_heads, dim)
    keys, values = (normal(rows * blocks, _BLOCK, kv_heads, dim) for _ in range(2))
    table = torch.arange(rows * blocks, dtype=torch.int32, device=device).view(rows, blocks)
    lens = torch.tensor(_LENGTHS, dtype=torch.int32, device=device)
    last = lens.long() - 1
    slots = table.gather(1, (last // _BLOCK)[:, None])[:, 0].long() * _BLOCK + last % _BLOCK
    angles = torch.arange(max(_LENGTHS), device=device)[:, None] / 1e4 ** torch.linspace(0, 1, dim // 2, device=device)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(layer.dtype)
    turn = Rotation(cos_sin, last)
    scale, softcap = float(layer.impl.scale), float(layer.impl.logits_soft_cap or 0.0)
    exact = Step(
        query.double(),
        key.double(),
        value.double(),
        keys.double(),
        values.double(),
        table,
        lens,
        slots,
        scale,
        turn._replace(cos_sin=cos_sin.double()),
        softcap=softcap,
    )
    truth = paged_decode_reference(exact)
    errors = []
    for length in (1, None):  # both of its tiles
        found = paged_decode(
            query,
            key,
            value,
            keys,
            values,
            table,
            lens,
            slots,
            scale=scale,
            rotation=turn,
            softcap=softcap,
            length=length,
        )
        errors.append((found.double() - truth).abs().max())
    # Queries, keys, weights and the result are rounded, and a cosine was; a score of many columns moves by as much
    bound = 16 * torch.finfo(layer.dtype).eps * max(1.0, truth.abs().max().item())
    return torch.stack(errors).max().item(), bound
