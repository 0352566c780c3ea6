"""The launchers."""

from __future__ import annotations

import torch

from trl_turbo.kernels.launching import launch
from trl_turbo.kernels.rows import on, processors
from trl_turbo.kernels.sizes import next_power_of_2

from .kernel_forward import forward_kernel
from .kernel_key import key_kernel, sum_kernel
from .kernel_query import query_kernel
from .plan import Tile, tile_of
from .segments import Segments
from .spec import Spec
from .tables import key_work, query_tiles

# A row's offset inside of a tile is 32 bits wide
_WIDEST_STRIDE = (1 << 31) // 256
_SUM_ROWS = 32
_LONGEST_STEP = 128


def forward(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    segments: Segments,
    spec: Spec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [T, Hq, D] and, for backward, log2 of each row's sum [Hq, T] in float32."""
    q, k, v = (_rows(x) for x in (q, k, v))
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    tile = _tile("forward", q)
    table = query_tiles(segments, tile.block, spec.window)
    with on(q.device):
        launch(
            forward_kernel,
            len(table) * q.shape[1],
            *_strided(q, k, v, o),
            lse,
            lse.stride(0),
            table,
            *_numbers(spec),
            HEADS=q.shape[1],
            PREFIX=segments.shared,
            **_constants(q, k, spec, tile),
        )
    return o, lse


def backward(
    grad_o: torch.Tensor,  # [T, Hq, D]
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    o: torch.Tensor,  # [T, Hq, D]
    lse: torch.Tensor,  # [Hq, T]
    segments: Segments,
    spec: Spec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, by a pass over queries and one over keys."""
    grad_o, q, k, v = (_rows(x) for x in (grad_o, q, k, v))
    with on(q.device):
        grad_q, stats = queries(grad_o, q, k, v, o, lse, segments, spec)
        return grad_q, *keys(grad_o, q, k, v, stats, segments, spec)


def queries(
    grad_o: torch.Tensor,  # [T, Hq, D]
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    o: torch.Tensor,  # [T, Hq, D]
    lse: torch.Tensor,  # [Hq, T]
    segments: Segments,
    spec: Spec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of q, and for `keys` lse and the sums of o * grad_o over the columns, float32 [Hq, T + room, 2]."""
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Steps of queries are read whole
    stats = torch.empty(lse.shape[0], lse.shape[1] + _LONGEST_STEP, 2, dtype=torch.float32, device=q.device)
    tile = _tile("query", q)
    table = query_tiles(segments, tile.block, spec.window)
    launch(
        query_kernel,
        len(table) * q.shape[1],
        *_strided(q, k, v, o, grad_o, grad_q),
        lse,
        lse.stride(0),
        stats,
        stats.stride(0),
        table,
        *_numbers(spec),
        HEADS=q.shape[1],
        PREFIX=segments.shared,
        **_constants(q, k, spec, tile),
    )
    return grad_q, stats


def keys(
    grad_o: torch.Tensor,  # [T, Hq, D]
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    stats: torch.Tensor,  # [Hq, T + room, 2]
    segments: Segments,
    spec: Spec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of k and v."""
    grad_k, grad_v = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    tile = _tile("key", q)
    heads, width = k.shape[1:]
    work = key_work(segments, tile.block, tile.step, q.shape[1] // heads, heads, spec.window, processors(q.device))
    sums = torch.empty(work.slots, heads, 2, tile.block, width, dtype=torch.float32, device=k.device)
    launch(
        key_kernel,
        len(work.items) * heads,
        *_strided(q, k, v, grad_o),
        grad_k,
        grad_v,
        *grad_k.stride()[:2],
        sums,
        stats.view(torch.int64),
        stats.shape[1],
        work.items,
        work.runs,
        *_numbers(spec),
        HEADS=heads,
        **_constants(q, k, spec, tile),
    )
    if work.slots:
        rows = min(_SUM_ROWS, tile.block)
        launch(
            sum_kernel,
            len(work.parts) * heads * (tile.block // rows),
            sums,
            grad_k,
            grad_v,
            *grad_k.stride()[:2],
            work.parts,
            HEADS=heads,
            D=width,
            COLUMNS=_columns(width),
            BLOCK=tile.block,
            ROWS=rows,
        )
    return grad_k, grad_v


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D], copied where its strides are not those that the kernels take."""
    fits = x.stride(2) == 1 and 0 <= x.stride(0) < _WIDEST_STRIDE
    return x if fits else x.contiguous()


def _strided(*tensors: torch.Tensor) -> list[torch.Tensor | int]:
    """Each tensor with its two strides."""
    return [y for x in tensors for y in (x, x.stride(0), x.stride(1))]


def _columns(width: int) -> int:
    return max(16, next_power_of_2(width))


def _tile(which: str, q: torch.Tensor) -> Tile:
    return tile_of(which, _columns(q.shape[2]), q.dtype, q.device)


def _numbers(spec: Spec) -> tuple[float, float, int]:
    return spec.scale, spec.softcap or 0.0, spec.window or 0


def _constants(q: torch.Tensor, k: torch.Tensor, spec: Spec, tile: Tile) -> dict[str, object]:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "WINDOW": spec.window is not None,
        "SOFTCAP": spec.softcap is not None,
        "PRECISION": _precision(q.dtype),
        "D": q.shape[2],
        "COLUMNS": _columns(q.shape[2]),
        "BLOCK": tile.block,
        "STEP": tile.step,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as torch is told to. Where the newer word is set, reading the older one raises."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    word = getattr(matmul, "fp32_precision", None)
    return "tf32" if (matmul.allow_tf32 if word is None else word == "tf32") else "ieee"
