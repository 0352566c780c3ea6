"""The Triton kernels: the weight is read once, by as many programs as keep the memory busy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trl_turbo.kernels.gated.kernel import activate
from trl_turbo.kernels.rows import on
from trl_turbo.kernels.sizes import ceil_div

from .tiles import Tile


@triton.jit
def _weight(pointers, there, columns, k, WHOLE: tl.constexpr, EVEN: tl.constexpr):
    """A tile of the weight [BLOCK_N, BLOCK_K], which nobody reads again; no mask where all of it is there."""
    if WHOLE and EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    elif EVEN:
        return tl.load(pointers, mask=there[:, None], other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=there[:, None] & (columns < k)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _rows_of_x(pointers, there, columns, k, EVEN: tl.constexpr):
    """A tile of x [BLOCK_M, BLOCK_K], zeros below its last row."""
    if EVEN:
        return tl.load(pointers, mask=there[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=there[:, None] & (columns < k)[None, :], other=0.0)


@triton.jit
def _add(sums, weight, x, SWAP: tl.constexpr):
    """Sums [BLOCK_N, BLOCK_M] where swapped, [BLOCK_M, BLOCK_N] where not."""
    if SWAP:
        return tl.dot(weight, tl.trans(x), sums, input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(weight), sums, input_precision="ieee")


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        return tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        return tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def _across(of_m, of_n, SWAP: tl.constexpr):
    """What rows [BLOCK_M] and columns [BLOCK_N] of the result are, each in the form of the sums."""
    if SWAP:
        return of_m[None, :], of_n[:, None]
    else:
        return of_m[:, None], of_n[None, :]


@triton.jit(do_not_specialize=["m", "n"])
def gated_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    weight_stride,
    out_ptr,
    out_stride,
    m,
    n,
    k,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
):
    """ROWS rows of the gate and the same of the up projection, [N, K] each, so that their product stays here."""
    lines = tl.arange(0, BLOCK_N)
    row = tl.program_id(0) * ROWS + lines
    there = (lines < ROWS) & (row < n)
    sample = tl.arange(0, BLOCK_M)
    inside = sample < m
    column = tl.arange(0, BLOCK_K)
    gates = weight_ptr + row.to(tl.int64)[:, None] * weight_stride + column[None, :]
    ups = gates + n.to(tl.int64) * weight_stride
    xs = x_ptr + sample[:, None] * x_stride + column[None, :]
    gate = _zeros(BLOCK_M, BLOCK_N, SWAP)
    up = _zeros(BLOCK_M, BLOCK_N, SWAP)
    for start in range(0, k, BLOCK_K):
        x = _rows_of_x(xs + start, inside, start + column, k, EVEN)
        gate = _add(gate, _weight(gates + start, there, start + column, k, WHOLE, EVEN), x, SWAP)
        up = _add(up, _weight(ups + start, there, start + column, k, WHOLE, EVEN), x, SWAP)
    # Rounded where the kernels that this stands for write: both halves, the activation, the product
    dtype = out_ptr.dtype.element_ty
    act, _ = activate(gate.to(dtype).to(tl.float32), ACTIVATION)
    h = (act.to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)).to(dtype)
    at_m, at_n = _across(sample, row, SWAP)
    kept_m, kept_n = _across(inside, there, SWAP)
    tl.store(out_ptr + at_m * out_stride + at_n, h, mask=kept_m & kept_n)


@triton.jit(do_not_specialize=["m", "n"])
def linear_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    weight_stride,
    bias_ptr,
    out_ptr,
    out_stride,
    partial_ptr,  # [SPLIT, N, 16]
    counter_ptr,  # [N], of which one for each ROWS rows is used
    m,
    n,
    k,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
):
    """ROWS rows of the weight and one of SPLIT parts of its columns; who comes last adds all in their order."""
    part = tl.program_id(1)
    lines = tl.arange(0, BLOCK_N)
    row = tl.program_id(0) * ROWS + lines
    there = (lines < ROWS) & (row < n)
    sample = tl.arange(0, BLOCK_M)
    inside = sample < m
    column = tl.arange(0, BLOCK_K)
    weights = weight_ptr + row.to(tl.int64)[:, None] * weight_stride + column[None, :]
    xs = x_ptr + sample[:, None] * x_stride + column[None, :]
    blocks = tl.cdiv(k, BLOCK_K)
    total = _zeros(BLOCK_M, BLOCK_N, SWAP)
    for start in range(part * blocks // SPLIT * BLOCK_K, (part + 1) * blocks // SPLIT * BLOCK_K, BLOCK_K):
        x = _rows_of_x(xs + start, inside, start + column, k, EVEN)
        total = _add(total, _weight(weights + start, there, start + column, k, WHOLE, EVEN), x, SWAP)
    at_m, at_n = _across(sample, row, SWAP)
    kept_m, kept_n = _across(inside, there, SWAP)
    kept = kept_m & kept_n
    last = True
    if SPLIT > 1:
        partials = partial_ptr + at_n.to(tl.int64) * PITCH + at_m
        apart = n.to(tl.int64) * PITCH
        tl.store(partials + part * apart, total, mask=kept)
        # All threads have written before one of them says so
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + tl.program_id(0), 1, sem="acq_rel")
        last = arrived == SPLIT - 1
    if last:
        if SPLIT > 1:
            total = _zeros(BLOCK_M, BLOCK_N, SWAP)
            for i in tl.static_range(SPLIT):
                # From L2, where the others' sums are: what lies in L1 may be of a launch before
                total += tl.load(partials + i * apart, mask=kept, other=0.0, cache_modifier=".cg")
            tl.store(counter_ptr + tl.program_id(0), 0)
        if BIAS:
            bias = tl.load(bias_ptr + row, mask=there, other=0.0).to(tl.float32)
            _, bias = _across(sample, bias, SWAP)
            total += bias
        tl.store(out_ptr + at_m * out_stride + at_n, total.to(out_ptr.dtype.element_ty), mask=kept)


def skinny_gated_triton(x: torch.Tensor, weight: torch.Tensor, activation: str, tile: Tile) -> torch.Tensor:
    """See `op.skinny_gated`; [M, K] and [2 * I, K] of one dtype, both with columns next to each other."""
    m, k = x.shape
    n = weight.shape[0] // 2
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    with on(x.device):
        gated_kernel[(ceil_div(n, tile.rows),)](
            x,
            x.stride(0),
            weight,
            weight.stride(0),
            out,
            out.stride(0),
            m,
            n,
            k,
            ACTIVATION=activation,
            **_constants(tile, m, n, k),
        )
    return out


def skinny_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tile: Tile,
    scratch: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """See `op.skinny_linear`; scratch is that of `Workspace.of`, and `None` where the tile is not split."""
    m, k = x.shape
    n = weight.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    partial, counters = (out, out) if scratch is None else scratch
    with on(x.device):
        linear_kernel[(ceil_div(n, tile.rows), tile.split)](
            x,
            x.stride(0),
            weight,
            weight.stride(0),
            x if bias is None else bias,
            out,
            out.stride(0),
            partial,
            counters,
            m,
            n,
            k,
            BIAS=bias is not None,
            SPLIT=tile.split,
            PITCH=partial.shape[-1],
            **_constants(tile, m, n, k),
        )
    return out


def _constants(tile: Tile, m: int, n: int, k: int) -> dict[str, object]:
    return {
        "ROWS": tile.rows,
        "BLOCK_M": tile.block_m(m),
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "WHOLE": tile.rows == tile.block_n and n % tile.rows == 0,
        "EVEN": k % tile.block_k == 0,
        "SWAP": tile.swap,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
