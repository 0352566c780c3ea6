"""The public functions."""

from __future__ import annotations

import functools

import torch

from trl_turbo.kernels.gated import ACTIVATIONS
from trl_turbo.kernels.rows import processors

from . import tiles, workspace
from .reference import skinny_gated_reference, skinny_linear_reference

_DTYPES = (torch.bfloat16, torch.float16)


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels take x [M, K] and a weight [N, K]; what they do not take is left to torch.

    On one CUDA device, of one 16-bit dtype, M from 1 to 16, columns next to each other, K and the strides of rows
    multiples of 16, and the first row at an address of a multiple of 16 bytes.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        return False
    if not x.is_cuda or x.device != weight.device or x.dtype not in _DTYPES or x.dtype != weight.dtype:
        return False
    (m, k), n = x.shape, weight.shape[0]
    if not 0 < m <= tiles.MOST_ROWS or n == 0 or k == 0 or k % 16:
        return False
    return all(
        tensor.stride(1) == 1 and tensor.stride(0) % 16 == 0 and tensor.data_ptr() % 16 == 0 for tensor in (x, weight)
    )


@torch.no_grad()
def skinny_gated(x: torch.Tensor, weight: torch.Tensor, activation: str) -> torch.Tensor:
    """act(x @ Wg.T) * (x @ Wu.T) in one launch, as a decode step's gated MLP begins.

    Both products are summed in float32; they, the activation and the result are rounded to the dtype, as by a product
    that is followed by vLLM's `SiluAndMul`. Where `fits` says no, plain torch computes the same.

    Args:
        x: [M, K], any floating dtype; the kernel takes M from 1 to 16, bf16 and fp16.
        weight: [2 * I, K], of x's dtype: the rows of the gate, then those of the up projection.
        activation: One of `gated.ACTIVATIONS`.

    Returns:
        [M, I], without a gradient.

    Raises:
        ValueError: Shapes, dtypes, devices or an activation that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"There is no activation {activation!r}; name one of {', '.join(ACTIVATIONS)}.")
    _check("skinny_gated", x, weight)
    if weight.shape[0] % 2:
        raise ValueError(f"skinny_gated takes a weight [2 * I, K]; found an odd number of rows, {weight.shape[0]}")
    if not (fits(x, weight) and _has_triton()):
        return skinny_gated_reference(x, weight, activation)
    from .kernel import skinny_gated_triton

    (m, k), n = x.shape, weight.shape[0] // 2
    return skinny_gated_triton(x, weight, activation, tiles.gated_tile(m, n, k, processors(x.device)))


@torch.no_grad()
def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scratch: workspace.Workspace | None = None,
) -> torch.Tensor:
    """x @ W.T + bias in one launch that splits the columns among programs, for weights with few rows.

    Partial sums are float32 and are added in one order: the same bits each time. It can be captured in a CUDA graph
    once it ran with the same shapes outside of one. Where `fits` says no, plain torch computes the same.

    Args:
        x: [M, K], any floating dtype; the kernel takes M from 1 to 16, bf16 and fp16.
        weight: [N, K], of x's dtype.
        bias: [N], of x's dtype.
        scratch: Who keeps the partial sums; must live as long as a graph that was captured with it, and its launches
            must be ordered on one stream. `None` takes one that the process keeps, for all that runs on one stream.

    Returns:
        [M, N], without a gradient.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
        RuntimeError: A CUDA graph is being captured, and there is no scratch for these shapes yet.
    """
    _check("skinny_linear", x, weight)
    n = weight.shape[0]
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"skinny_linear takes a bias [{n}] in {x.dtype} on {x.device}; found {list(bias.shape)} in {bias.dtype} on "
            f"{bias.device}"
        )
    if not (fits(x, weight) and (bias is None or bias.is_contiguous()) and _has_triton()):
        return skinny_linear_reference(x, weight, bias)
    from .kernel import skinny_linear_triton

    tile = tiles.linear_tile(x.shape[0], n, x.shape[1], processors(x.device))
    made = (scratch or workspace.shared()).of(x.device, n, tile.split) if tile.split > 1 else None
    return skinny_linear_triton(x, weight, bias, tile, made)


def _check(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"{name} takes x [M, K] and a weight [N, K]; found {list(x.shape)} and {list(weight.shape)}")
    if x.dtype != weight.dtype or not x.is_floating_point() or x.device != weight.device:
        raise ValueError(
            f"{name} takes x and a weight of one floating dtype on one device; found {x.dtype} on {x.device} and "
            f"{weight.dtype} on {weight.device}"
        )


@functools.cache
def _has_triton() -> bool:
    try:
        from . import kernel  # noqa: F401
    except ImportError:  # torch builds without Triton (Windows)
        return False
    return True
