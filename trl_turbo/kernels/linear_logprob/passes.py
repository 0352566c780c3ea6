"""The loops over tiles: cuBLAS (or the CPU's BLAS) makes a tile of logits, a kernel folds it, nothing wider exists."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from . import plan, tiles
from .spec import LinearLogprobOutput, Spec

# bf16/fp16 products with a float32 result, CUDA only
_MM_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def backend(device: torch.device, dtype: torch.dtype) -> Any:
    """The module whose `fold`, `jacobian` and `grad_tile` serve this device: Triton's on a GPU, torch's elsewhere."""
    if device.type != "cuda" or dtype == torch.float64:
        return tiles
    try:
        from . import kernel
    except ImportError:  # torch builds without Triton (Windows)
        return tiles
    return kernel


class Piece(NamedTuple):
    """A slice of the head, in the compute dtype."""

    start: int
    end: int
    joint_t: torch.Tensor  # [K, w] of weight and b side by side
    weight: torch.Tensor  # [w, H]
    bias: torch.Tensor | None  # [w]
    b: torch.Tensor | None  # [w, R]


class Head:
    """The output head, handed out a slice of the vocabulary at a time."""

    def __init__(
        self,
        weight: torch.Tensor,  # [V, H]
        bias: torch.Tensor | None,  # [V]
        b: torch.Tensor | None,  # [V, R]
        dtype: torch.dtype,
    ):
        self.weight, self.b, self.dtype = weight, b, dtype
        self.bias = None if bias is None else bias.contiguous()

    def pieces(self, columns: int) -> Callable[[], Iterable[Piece]]:
        """The slices, as often as asked: views made once where dtype and strides allow, else cast one by one."""
        spans = split(self.weight.shape[0], columns)
        if self.b is None and dense(self.weight[:columns], self.dtype).data_ptr() == self.weight.data_ptr():
            views = [self._piece(*span) for span in spans]
            return lambda: views
        return lambda: (self._piece(*span) for span in spans)

    def _piece(self, start: int, end: int) -> Piece:
        bias = None if self.bias is None else self.bias[start:end]
        joint, weight, b = join(self.weight[start:end], None if self.b is None else self.b[start:end], self.dtype)
        return Piece(start, end, joint.t(), weight, bias, b)


def join(
    x: torch.Tensor,  # [n, H]
    y: torch.Tensor | None,  # [n, R]
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`x` and `y` side by side [n, K] in `dtype`, and the views of each; `x` itself where there is no `y`.

    So hidden @ weight.T + a @ b.T is one product, rounded once. As two it is rounded twice, and on an H200 the
    entropy's gradient, from tiles made again in another shape, was up to 30% further off than plain torch's.
    """
    if y is None:
        x = dense(x, dtype)
        return x, x, None
    h, r = x.shape[1], y.shape[1]
    joint = x.new_zeros((x.shape[0], (h + r + 7) // 8 * 8), dtype=dtype)  # whole 16 bytes a row, as BLAS likes it
    joint[:, :h], joint[:, h : h + r] = x, y
    return joint, joint[:, :h], joint[:, h : h + r]


def forward(
    hidden: torch.Tensor,  # [N, H]
    head: Head,
    a: torch.Tensor | None,  # [N, R]
    targets: torch.Tensor,  # [N]
    spec: Spec,
    jac_hidden: bool = False,
    jac_a: bool = False,
) -> tuple[LinearLogprobOutput, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The statistics, the norm [2, N], and where asked d logps / d hidden [N, H] and d logps / d a [N, R].

    logps of row i depends on row i of hidden alone, so its whole backward is one factor a row: as in flash attention,
    with the head as both keys and values, the expectation of the weight under the softmax is summed while the tile
    exists. That costs one product more here and saves two in the backward.
    """
    n, h = hidden.shape
    vocab, dtype = head.weight.shape[0], spec.compute_dtype
    stats = torch.empty((tiles.N_STATS, n), device=hidden.device, dtype=spec.stats_dtype)
    width = (h if jac_hidden else 0) + (a.shape[1] if a is not None and jac_a else 0)
    budget = spec.byte_budget or (plan.CPU_BYTES if hidden.device.type == "cpu" else None)
    rows, columns = plan.rows_outer(n, vocab, width, dtype.itemsize, budget)
    if a is not None:
        columns = min(columns, plan.COLUMNS)  # a slice of the head is copied, beside its factor
    out_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if jac_hidden else None
    out_a = torch.empty_like(a, memory_format=torch.contiguous_format) if a is not None and jac_a else None
    tile_of = _Buffer(rows, columns, dtype, hidden.device)
    sums = torch.empty((rows, width), device=hidden.device, dtype=spec.stats_dtype) if width else None
    ops = backend(hidden.device, dtype)
    with plain(hidden.device):
        pieces = head.pieces(columns)
        # The views of a block of rows are made outside of its loop: each costs the host microseconds, a tile not many
        for r0, r1 in split(n, rows):
            targets_rows, stats_rows = targets[r0:r1], stats[:, r0:r1]
            joint, _, _ = join(hidden[r0:r1], None if a is None else a[r0:r1], dtype)
            acc = None if sums is None else sums[: r1 - r0]
            acc_hidden = None if acc is None or not jac_hidden else acc[:, :h]
            acc_a = None if acc is None or out_a is None else acc[:, width - out_a.shape[1] :]
            for piece in pieces():
                tile = tile_of.logits(joint, piece)
                ops.fold(tile, piece.bias, targets_rows, stats_rows, acc, piece.start, spec.transform, spec.outputs)
                if acc_hidden is not None:
                    _accumulate(acc_hidden, tile, piece.weight, first=piece.start == 0)
                if acc_a is not None and piece.b is not None:
                    _accumulate(acc_a, tile, piece.b, first=piece.start == 0)
            for out, factor, part in ((out_hidden, head.weight, acc_hidden), (out_a, head.b, acc_a)):
                if out is not None and factor is not None and part is not None:
                    ops.jacobian(part, stats_rows, factor, targets_rows, spec.transform, out[r0:r1])
    return tiles.finish(stats, vocab, spec.outputs), tiles.norm_of(stats), out_hidden, out_a


def backward(
    hidden: torch.Tensor,  # [N, H]
    head: Head,
    a: torch.Tensor | None,  # [N, R]
    targets: torch.Tensor,  # [N]
    norm: torch.Tensor,  # [2, N] as from `tiles.norm_of`
    entropy: torch.Tensor | None,  # [N]
    grad_logps: torch.Tensor | None,  # [N]
    grad_entropy: torch.Tensor | None,  # [N]
    spec: Spec,
    needs: tuple[bool, bool, bool, bool, bool],
) -> list[torch.Tensor | None]:
    """Gradients for hidden, weight, bias, a and b, each where `needs` it, from tiles that are made once more.

    Where the head trains, the vocabulary is the outer loop, so that its float32 gradient is one [columns, H] slice at a
    time; a float32 [V, H] is 2.5 GB for V = 151,936 and H = 4,096. Where it does not, rows are, for the same reason.
    """
    n, h = hidden.shape
    vocab, dtype = head.weight.shape[0], spec.compute_dtype
    rank = 0 if a is None else a.shape[1]
    needs_hidden, needs_weight, needs_bias, needs_a, needs_b = needs
    inputs = (hidden, head.weight, head.bias, a, head.b)
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and need else None
        for x, need in zip(inputs, needs, strict=True)
    ]
    if n == 0:
        return [None if grad is None else grad.zero_() for grad in grads]
    (grad_logps, grad_entropy), unit = _normalised(grad_logps, grad_entropy, dtype)
    budget = spec.byte_budget or (plan.CPU_BYTES if hidden.device.type == "cpu" else None)
    head_trains = needs_weight or needs_bias or needs_b
    if head_trains:
        rows, columns = plan.vocab_outer(n, vocab, h if needs_weight else rank, dtype.itemsize, budget)
    else:
        width = (h if needs_hidden else 0) + (rank if needs_a else 0)
        rows, columns = plan.rows_outer(n, vocab, width, dtype.itemsize, budget)
    tile_of = _Buffer(rows, columns, dtype, hidden.device)
    row_sums = [_Sum(grads[i], n if head_trains else rows, vocab <= columns, unit, spec) for i in (0, 3)]
    head_sums = [_Sum(grads[i], columns, n <= rows, unit, spec) for i in (1, 2, 4)]
    ops = backend(hidden.device, dtype)

    def one(rows: _Rows, piece: Piece) -> None:
        tile = tile_of.logits(rows.joint, piece)
        ops.grad_tile(
            tile,
            piece.bias,
            rows.targets,
            rows.norm,
            rows.entropy,
            rows.grad_logps,
            rows.grad_entropy,
            piece.start,
            spec.transform,
        )
        for total, other in zip(row_sums, (piece.weight, piece.b), strict=True):
            total.add(rows.start, rows.end, tile, other, first=piece.start == 0, last=piece.end == vocab)
        for total, other in zip(head_sums, (rows.hidden, None, rows.a), strict=True):
            total.add(piece.start, piece.end, tile.t(), other, first=rows.start == 0, last=rows.end == n)

    with plain(hidden.device):
        by_row = (entropy, grad_logps, grad_entropy)
        blocks = [
            _Rows(
                r0,
                r1,
                *join(hidden[r0:r1], None if a is None else a[r0:r1], dtype),
                targets[r0:r1],
                norm[:, r0:r1],
                *(None if x is None else x[r0:r1] for x in by_row),
            )
            for r0, r1 in split(n, rows)
        ]
        pieces = head.pieces(columns)
        if head_trains:
            for piece in pieces():
                for block in blocks:
                    one(block, piece)
        else:
            for block in blocks:
                for piece in pieces():
                    one(block, piece)
    return grads


def scale_rows(
    jac: torch.Tensor,  # [N, H]
    factor: torch.Tensor,  # [N]
) -> torch.Tensor:
    """`factor[:, None] * jac` [N, H] in the dtype of `jac`, without a float32 [N, H] between."""
    out = torch.empty_like(jac)
    if jac.device.type == "cuda":  # one kernel that casts in registers
        return torch.mul(jac, factor.unsqueeze(-1), out=out)
    for r0, r1 in split(jac.shape[0], 1024):
        out[r0:r1] = jac[r0:r1] * factor[r0:r1].unsqueeze(-1)
    return out


class _Rows(NamedTuple):
    """A block of rows, in the compute dtype."""

    start: int
    end: int
    joint: torch.Tensor  # [n, K] of hidden and a side by side
    hidden: torch.Tensor  # [n, H]
    a: torch.Tensor | None  # [n, R]
    targets: torch.Tensor  # [n]
    norm: torch.Tensor  # [2, n]
    entropy: torch.Tensor | None  # [n]
    grad_logps: torch.Tensor | None  # [n]
    grad_entropy: torch.Tensor | None  # [n]


class _Buffer:
    """The one tile that all logits pass through."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device):
        self.whole = torch.empty((rows, columns), device=device, dtype=dtype)

    def logits(
        self,
        joint: torch.Tensor,  # [n, K]
        piece: Piece,
    ) -> torch.Tensor:
        """`hidden @ weight.T + a @ b.T` [n, w]; the kernels add the bias, in float32."""
        shape = joint.shape[0], piece.weight.shape[0]
        tile = self.whole if self.whole.shape == shape else self.whole[: shape[0], : shape[1]]
        torch.mm(joint, piece.joint_t, out=tile)
        return tile


class _Sum:
    """A float32 sum of products, and the gradient that it is rounded into once, when the last of them is in."""

    def __init__(self, grad: torch.Tensor | None, length: int, once: bool, unit: torch.Tensor | None, spec: Spec):
        self.grad = None if grad is None else grad.view(grad.shape[0], -1)  # [M, K]; a bias is [V, 1]
        self.unit = unit
        self.buffer: torch.Tensor | None = None
        if self.grad is None or (unit is None and self.grad.dtype == spec.stats_dtype):
            return
        if once and unit is None and self.grad.dtype == spec.compute_dtype:
            return  # a single product of matrices of that dtype is summed in float32 and rounded once as it is
        shape = min(length, len(self.grad)), self.grad.shape[1]
        self.buffer = torch.empty(shape, device=self.grad.device, dtype=spec.stats_dtype)
        self.whole = len(self.buffer) == len(self.grad)

    def add(
        self,
        start: int,
        end: int,
        x: torch.Tensor,  # [end - start, L]
        y: torch.Tensor | None,  # [L, K]; None for the sum over L
        *,
        first: bool,
        last: bool,
    ) -> None:
        """Add `x @ y` to rows `start` to `end`."""
        if self.grad is None:
            return
        if self.buffer is None:
            acc = self.grad[start:end]
        else:
            acc = self.buffer[start:end] if self.whole else self.buffer[: end - start]
        if y is not None:
            _accumulate(acc, x, y, first=first)
        elif first:
            torch.sum(x, 1, keepdim=True, dtype=acc.dtype, out=acc)
        else:
            acc += x.sum(1, keepdim=True, dtype=acc.dtype)
        if last and self.buffer is not None:
            self.grad[start:end] = acc if self.unit is None else acc * self.unit


def _accumulate(
    acc: torch.Tensor,  # [M, K] float32, or the dtype of x for a single product
    x: torch.Tensor,  # [M, L]
    y: torch.Tensor,  # [L, K]
    *,
    first: bool,
) -> None:
    """`acc (+)= x @ y`, summed in float32: rounding each tile's product to bf16 first biases training."""
    if first and acc.dtype == x.dtype:
        torch.mm(x, y, out=acc)
    elif _MM_OUT_DTYPE and acc.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16):
        if first:
            torch.mm(x, y, out_dtype=acc.dtype, out=acc)
        else:
            torch.addmm(acc, x, y, out_dtype=acc.dtype, out=acc)
    elif first:
        torch.mm(x.to(acc.dtype), y.to(acc.dtype), out=acc)
    else:
        acc.addmm_(x.to(acc.dtype), y.to(acc.dtype))


def _normalised(
    grad_logps: torch.Tensor | None,  # [N]
    grad_entropy: torch.Tensor | None,  # [N]
    dtype: torch.dtype,
) -> tuple[tuple[torch.Tensor | None, torch.Tensor | None], torch.Tensor | None]:
    """For float16 tiles, gradients scaled to at most 1, and the unit to multiply back in float32.

    A mean over 8,192 tokens gives g = 1e-4, and g p is below float16's smallest number, 6e-8, for every p under 5e-4.
    """
    given = [grad for grad in (grad_logps, grad_entropy) if grad is not None]
    if dtype != torch.float16 or not given:
        return (grad_logps, grad_entropy), None
    unit = torch.stack([grad.abs().amax() for grad in given]).amax()
    unit = unit.masked_fill(unit == 0, 1.0)
    scaled = tuple(None if grad is None else grad / unit for grad in (grad_logps, grad_entropy))
    return (scaled[0], scaled[1]), unit


def dense(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in `dtype`, copied where BLAS could not take its strides and would copy it again for each tile."""
    x = x.to(dtype)
    rows_first = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    columns_first = x.stride(0) == 1 and x.stride(1) >= x.shape[0]
    return x if rows_first or columns_first else x.contiguous()


def split(total: int, size: int) -> list[tuple[int, int]]:
    """`range(total)` in pieces of `size`, the last one smaller."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]


@contextlib.contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """No autograd, no autocast (the tiles have their dtype already), and Triton launching on the tensors' own GPU."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), on_device:
        yield
