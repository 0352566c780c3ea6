"""The Triton kernel and its launcher: a program turns all heads of one token, q and k, by angles read once."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from trl_turbo.kernels.launching import launch
from trl_turbo.kernels.rows import on
from trl_turbo.kernels.sizes import next_power_of_2

#: Pairs of a tile, and how many of them a thread has: 8, which are two loads of 16 bytes in bf16.
TILE, PER_THREAD = 2048, 8


@triton.jit(do_not_specialize=["length"])
def turn_kernel(
    q_ptr,
    q_batch,
    q_head,
    q_token,
    k_ptr,
    k_batch,
    k_head,
    k_token,
    q_out_ptr,
    q_out_batch,
    q_out_head,
    q_out_token,
    k_out_ptr,
    k_out_batch,
    k_out_head,
    k_out_token,
    cos_ptr,
    cos_batch,
    cos_token,
    sin_ptr,
    sin_batch,
    sin_token,
    length,
    Q_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr,
):
    """Turn one token's HEADS heads, queries' and then keys'; `*_batch`, `*_head` and `*_token` are strides."""
    # Rounded as torch rounds: in what the two dtypes promote to, each product and the sum
    x_type: tl.constexpr = q_ptr.dtype.element_ty
    angle_type: tl.constexpr = cos_ptr.dtype.element_ty
    product_type: tl.constexpr = x_type if x_type == angle_type else tl.float32
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    q_ptr += batch * q_batch + token * q_token
    k_ptr += batch * k_batch + token * k_token
    q_out_ptr += batch * q_out_batch + token * q_out_token
    k_out_ptr += batch * k_out_batch + token * k_out_token
    cos_ptr += batch * cos_batch + token * cos_token
    sin_ptr += batch * sin_batch + token * sin_token
    pair = tl.arange(0, HALF)[None, :]
    both = tl.arange(0, 2 * HALF)[None, :]
    has_pair = pair < R // 2
    if INTERLEAVED:
        cos_1, cos_2 = tl.split(tl.reshape(tl.load(cos_ptr + both, mask=both < R, other=0.0), (1, HALF, 2)))
        sin_1, sin_2 = tl.split(tl.reshape(tl.load(sin_ptr + both, mask=both < R, other=0.0), (1, HALF, 2)))
    else:
        cos_1 = tl.load(cos_ptr + pair, mask=has_pair, other=0.0)
        cos_2 = tl.load(cos_ptr + R // 2 + pair, mask=has_pair, other=0.0)
        sin_1 = tl.load(sin_ptr + pair, mask=has_pair, other=0.0)
        sin_2 = tl.load(sin_ptr + R // 2 + pair, mask=has_pair, other=0.0)
    cos_1, cos_2 = cos_1.to(tl.float32), cos_2.to(tl.float32)
    sin_1, sin_2 = sin_1.to(tl.float32), sin_2.to(tl.float32)
    for start in tl.static_range(0, HEADS, TILE_HEADS):
        # Keys beside queries in one tile: two heads of keys alone would be loaded by 2 bytes a thread
        head = (start + tl.arange(0, TILE_HEADS)).to(tl.int64)[:, None]
        has_head = head < HEADS
        is_q = head < Q_HEADS
        k_index = head - Q_HEADS
        from_ptr = tl.where(is_q, q_ptr + head * q_head, k_ptr + k_index * k_head)
        to_ptr = tl.where(is_q, q_out_ptr + head * q_out_head, k_out_ptr + k_index * k_out_head)
        if ALIGNED:
            # What the choice between pointers made the compiler forget, and with it loads of 16 bytes
            from_ptr = tl.multiple_of(from_ptr, (16, 16))
            to_ptr = tl.multiple_of(to_ptr, (16, 16))
        if INTERLEAVED:
            inside = has_head & (both < R)
            x_1, x_2 = tl.split(tl.reshape(tl.load(from_ptr + both, mask=inside, other=0.0), (TILE_HEADS, HALF, 2)))
        else:
            inside = has_head & has_pair
            x_1 = tl.load(from_ptr + pair, mask=inside, other=0.0)
            x_2 = tl.load(from_ptr + R // 2 + pair, mask=inside, other=0.0)
        x_1, x_2 = x_1.to(tl.float32), x_2.to(tl.float32)
        straight_1 = (x_1 * cos_1).to(product_type).to(tl.float32)
        straight_2 = (x_2 * cos_2).to(product_type).to(tl.float32)
        if BACK:
            out_1 = straight_1 + (x_2 * sin_2).to(product_type).to(tl.float32)
            out_2 = straight_2 - (x_1 * sin_1).to(product_type).to(tl.float32)
        else:
            out_1 = straight_1 - (x_2 * sin_1).to(product_type).to(tl.float32)
            out_2 = straight_2 + (x_1 * sin_2).to(product_type).to(tl.float32)
        out_1, out_2 = out_1.to(x_type), out_2.to(x_type)
        if INTERLEAVED:
            tl.store(to_ptr + both, tl.reshape(tl.join(out_1, out_2), (TILE_HEADS, 2 * HALF)), mask=inside)
        else:
            tl.store(to_ptr + pair, out_1, mask=inside)
            tl.store(to_ptr + R // 2 + pair, out_2, mask=inside)
        if REST > 0:
            column = R + tl.arange(0, REST)[None, :]
            beyond = has_head & (column < D)
            tl.store(to_ptr + column, tl.load(from_ptr + column, mask=beyond, other=0.0), mask=beyond)


class _Launch(NamedTuple):
    """What a launch is told beside its tensors."""

    programs: int
    strides: tuple[tuple[int, ...], ...]  # of q, k and their results, but for the last
    angle_strides: tuple[tuple[int, int], ...]
    aligned: bool  # whether rows start at multiples of 16 bytes where their tensors do
    constants: dict[str, int]


def turn(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.turn`; columns are side by side, R is above 0, and cos and sin are of one dtype."""
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    heads = (q, k, q_out, k_out)
    strides = q.stride(), k.stride(), q_out.stride(), k_out.stride()
    made = _launch(q.shape, k.shape[1], q.element_size(), cos.shape, cos.stride(), sin.stride(), *strides)
    of_q, of_k, of_q_out, of_k_out = made.strides
    cos_strides, sin_strides = made.angle_strides
    with on(q.device):
        launch(
            turn_kernel,
            made.programs,
            q,
            *of_q,
            k,
            *of_k,
            q_out,
            *of_q_out,
            k_out,
            *of_k_out,
            cos,
            *cos_strides,
            sin,
            *sin_strides,
            q.shape[2],
            **made.constants,
            ALIGNED=made.aligned and all(x.data_ptr() % 16 == 0 for x in heads),
            INTERLEAVED=interleaved,
            BACK=back,
        )
    return q_out, k_out


# A layer's shapes come again in each layer and step
@functools.lru_cache(4096)
def _launch(
    shape: tuple[int, ...],  # of q
    k_heads: int,
    itemsize: int,
    angles: tuple[int, ...],  # the shape of cos
    cos_strides: tuple[int, ...],
    sin_strides: tuple[int, ...],
    *strides: tuple[int, ...],  # of q, k and their results
) -> _Launch:
    batch, q_heads, length, width = shape
    heads, turned = q_heads + k_heads, angles[-1]
    half = next_power_of_2(turned // 2)
    tile_heads = max(1, min(next_power_of_2(heads), TILE // half))
    rest = next_power_of_2(width - turned) if width > turned else 0
    pairs = tile_heads * max(half, rest // 2)
    sizes = [(batch, n, length) for n in (q_heads, k_heads, q_heads, k_heads)]
    steps = [
        stride
        for of_tensor, size in zip(strides, sizes, strict=True)
        for stride, count in zip(of_tensor[:3], size, strict=True)
        if count > 1
    ]
    return _Launch(
        programs=batch * length,
        strides=tuple(of_tensor[:3] for of_tensor in strides),
        angle_strides=tuple((0 if angles[0] == 1 else of[0], of[1]) for of in (cos_strides, sin_strides)),
        aligned=all(step * itemsize % 16 == 0 for step in steps),
        constants={
            "Q_HEADS": q_heads,
            "HEADS": heads,
            "D": width,
            "R": turned,
            "TILE_HEADS": tile_heads,
            "HALF": half,
            "REST": rest,
            "num_warps": min(8, max(1, pairs // (32 * PER_THREAD))),
        },
    )
