"""The launchers of the Triton kernels, one program a row of a tile: the twins of `tiles`, call for call.

Rows are on the grid's first axis, which takes 2^31 - 1 blocks (the others take 65,535), and row offsets are int64: a
tile of 4,096 x 16,384 is small, but the hidden states and the head are not.
"""

from __future__ import annotations

import torch

from trl_turbo.kernels.sizes import ceil_div, next_power_of_2

from .kernel_fold import fold_kernel
from .kernel_grad import grad_kernel, jacobian_kernel
from .spec import Transform

# Columns that a program takes at a time, and its warps
_FOLD_BLOCK, _FOLD_WARPS = 1024, 4
_GRAD_BLOCK, _GRAD_WARPS = 8192, 8
_JACOBIAN_BLOCK, _JACOBIAN_WARPS = 1024, 4


def fold(
    tile: torch.Tensor,  # [n, w]
    bias: torch.Tensor | None,  # [w]
    targets: torch.Tensor,  # [n]
    stats: torch.Tensor,  # [7, n]
    acc: torch.Tensor | None,  # [n, A]
    vocab_start: int,
    transform: Transform,
    outputs: tuple[str, ...],
) -> None:
    """See `tiles.fold`."""
    n, w = tile.shape
    if n == 0:
        return
    block = min(max(next_power_of_2(w), 128), _FOLD_BLOCK)
    fold_kernel[(n,)](
        tile,
        tile.stride(0),
        tile if bias is None else bias,
        targets,
        stats,
        stats.stride(0),
        stats if acc is None else acc,
        0 if acc is None else acc.stride(0),
        0 if acc is None else acc.shape[1],
        vocab_start,
        w,
        abs(transform.slope),
        transform.logit_scale,
        transform.softcap or 1.0,
        1 / transform.temperature,
        NEGATIVE=transform.slope < 0,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=transform.softcap is not None,
        HAS_ENTROPY="entropy" in outputs,
        HAS_SQUARES="logsumexp2" in outputs,
        HAS_MEAN="mean_logit" in outputs,
        HAS_TOP1="top1" in outputs,
        HAS_ACC=acc is not None,
        EVEN=w % block == 0,
        # Where -inf can be: outside of the tile, from a bias, from float16
        CLAMP=w % block != 0 or bias is not None or tile.dtype == torch.float16,
        EXACT=tile.dtype == torch.float32,
        BLOCK=block,
        num_warps=_FOLD_WARPS,
        enable_fp_fusion=tile.dtype != torch.float32,
    )


def jacobian(
    acc: torch.Tensor,  # [n, H]
    stats: torch.Tensor,  # [7, n]
    weight: torch.Tensor,  # [V, H]
    targets: torch.Tensor,  # [n]
    transform: Transform,
    out: torch.Tensor,  # [n, H]
) -> None:
    """See `tiles.jacobian`."""
    n, h = out.shape
    if n == 0 or h == 0:
        return
    jacobian_kernel[(n, ceil_div(h, _JACOBIAN_BLOCK))](
        acc,
        acc.stride(0),
        stats,
        stats.stride(0),
        weight,
        weight.stride(0),
        weight.stride(1),
        targets,
        out,
        out.stride(0),
        weight.shape[0],
        h,
        transform.slope,
        transform.temperature / (transform.softcap or 1.0),
        HAS_SOFTCAP=transform.softcap is not None,
        BLOCK=_JACOBIAN_BLOCK,
        num_warps=_JACOBIAN_WARPS,
    )


def grad_tile(
    tile: torch.Tensor,  # [n, w]
    bias: torch.Tensor | None,  # [w]
    targets: torch.Tensor,  # [n]
    norm: torch.Tensor,  # [2, n]
    entropy: torch.Tensor | None,  # [n]
    grad_logps: torch.Tensor | None,  # [n]
    grad_entropy: torch.Tensor | None,  # [n]
    vocab_start: int,
    transform: Transform,
) -> None:
    """See `tiles.grad_tile`."""
    n, w = tile.shape
    if n == 0:
        return
    if grad_entropy is not None and entropy is None:
        raise ValueError(
            "grad_entropy was given without the entropy that it is made from; pass entropy as the forward gave it."
        )
    block = min(max(next_power_of_2(w), 128), _GRAD_BLOCK)
    grad_kernel[(n, ceil_div(w, block))](
        tile,
        tile.stride(0),
        tile if bias is None else bias,
        targets,
        norm,
        norm.stride(0),
        norm if entropy is None else entropy,
        norm if grad_logps is None else grad_logps,
        norm if grad_entropy is None else grad_entropy,
        vocab_start,
        w,
        transform.slope,
        transform.logit_scale,
        transform.softcap or 1.0,
        1 / transform.temperature,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=transform.softcap is not None,
        HAS_GRAD_LOGPS=grad_logps is not None,
        HAS_GRAD_ENTROPY=grad_entropy is not None,
        EVEN=w % block == 0,
        EXACT=tile.dtype == torch.float32,
        BLOCK=block,
        num_warps=_GRAD_WARPS,
        enable_fp_fusion=tile.dtype != torch.float32,
    )
