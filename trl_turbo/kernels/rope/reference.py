"""The truth in plain torch, and the same two passes that the kernel makes, for what the kernel does not take."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """A quarter turn of each pair of x [..., R], half a row apart or side by side: (a, b) becomes (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rope_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, *, back: bool = False
) -> torch.Tensor:
    """Turn x [B, H, T, D] by cos and sin [B or 1, T, R], or gradients of what was turned `back`, in x's dtype.

    Differentiable by autograd. It rounds as transformers' `apply_rotary_pos_emb` does where dtypes are one, each
    product and the sum; where the angles' is wider, only the sum is rounded, at last.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    quarter = -rotate(turned * sin, interleaved) if back else rotate(turned, interleaved) * sin
    turned = (turned * cos + quarter).to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def turn(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn q [B, H, T, D] and k [B, Hk, T, D]; the results are laid out as q and k are."""
    outputs = tuple(torch.empty_like(x).copy_(rope_reference(x, cos, sin, interleaved, back=back)) for x in (q, k))
    return outputs[0], outputs[1]
