"""The loops over tiles: cuBLAS (or the CPU's BLAS) makes a tile of logits, a kernel folds it, nothing wider exists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

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


class Head:
    """The output head, handed out a slice of the vocabulary at a time in the compute dtype."""

    def __init__(
        self,
        weight: torch.Tensor,  # [V, H]
        bias: torch.Tensor | None,  # [V]
        b: torch.Tensor | None,  # [V, R]
        dtype: torch.dtype,
    ):
        self.weight, self.bias, self.b, self.dtype = weight, bias, b, dtype

    def slice(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`weight[start:end]` [w, H], `bias` [w] and `b` [w, R]: views where dtype and strides allow, never [V, H]."""
        weight = _dense(self.weight[start:end], self.dtype)
        bias = None if self.bias is None else self.bias[start:end].contiguous()
        b = None if self.b is None else _dense(self.b[start:end], self.dtype)
        return weight, bias, b


def forward(
    hidden: torch.Tensor,  # [N, H]
    head: Head,
    a: torch.Tensor | None,  # [N, R]
    targets: torch.Tensor,  # [N]
    spec: Spec,
    outputs: tuple[str, ...],
    jac_hidden: bool = False,
    jac_a: bool = False,
) -> tuple[LinearLogprobOutput, torch.Tensor | None, torch.Tensor | None]:
    """The statistics; where asked, also d logps / d hidden [N, H] and d logps / d a [N, R].

    logps of row i depends on row i of hidden alone, so its whole backward is one factor a row: as in flash attention, with
    the head as both keys and values, the expectation of the weight under the softmax is summed while the tile exists.
    That costs one product more here and saves two in the backward.
    """
    n, h = hidden.shape
    vocab, dtype = head.weight.shape[0], spec.compute_dtype
    stats = torch.empty((tiles.N_STATS, n), device=hidden.device, dtype=spec.stats_dtype)
    width = (h if jac_hidden else 0) + (a.shape[1] if a is not None and jac_a else 0)
    budget = spec.byte_budget or plan.default_budget_bytes(n, h, dtype.itemsize)
    rows, columns = plan.rows_outer(n, vocab, width, dtype.itemsize, budget)
    out_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if jac_hidden else None
    out_a = torch.empty_like(a, memory_format=torch.contiguous_format) if a is not None and jac_a else None
    buffer = torch.empty((rows, columns), device=hidden.device, dtype=dtype)
    sums = torch.empty((rows, width), device=hidden.device, dtype=spec.stats_dtype) if width else None
    ops = backend(hidden.device, dtype)
    with plain(hidden.device):
        for r0, r1 in _pieces(n, rows):
            hidden_rows = _dense(hidden[r0:r1], dtype)
            a_rows = None if a is None else _dense(a[r0:r1], dtype)
            acc = None if sums is None else sums[: r1 - r0]
            for v0, v1 in _pieces(vocab, columns):
                weight, bias, b = head.slice(v0, v1)
                tile = _logits(hidden_rows, weight, a_rows, b, buffer)
                ops.fold(tile, bias, targets[r0:r1], stats[:, r0:r1], acc, v0, spec.transform, outputs)
                if acc is not None and jac_hidden:
                    _accumulate(acc[:, :h], tile, weight, first=v0 == 0)
                if acc is not None and b is not None and out_a is not None:
                    _accumulate(acc[:, width - b.shape[1] :], tile, b, first=v0 == 0)
            for out, factor, at in ((out_hidden, head.weight, 0), (out_a, head.b, h if jac_hidden else 0)):
                if acc is not None and out is not None and factor is not None:
                    ops.jacobian(
                        acc[:, at : at + out.shape[1]],
                        stats[:, r0:r1],
                        factor,
                        targets[r0:r1],
                        spec.transform,
                        out[r0:r1],
                    )
    return tiles.finish(stats, vocab, outputs), out_hidden, out_a


def backward(
    hidden: torch.Tensor,  # [N, H]
    head: Head,
    a: torch.Tensor | None,  # [N, R]
    targets: torch.Tensor,  # [N]
    logsumexp: torch.Tensor,  # [N]
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
    budget = spec.byte_budget or plan.default_budget_bytes(n, h, dtype.itemsize)
    head_trains = needs_weight or needs_bias or needs_b
    if head_trains:
        rows, columns = plan.vocab_outer(n, vocab, h if needs_weight else rank, dtype.itemsize, budget)
    else:
        width = (h if needs_hidden else 0) + (rank if needs_a else 0)
        rows, columns = plan.rows_outer(n, vocab, width, dtype.itemsize, budget)
    buffer = torch.empty((rows, columns), device=hidden.device, dtype=dtype)
    row_sums = [_Sum(grads[i], n if head_trains else rows, unit, spec.stats_dtype) for i in (0, 3)]
    head_sums = [_Sum(grads[i], columns, unit, spec.stats_dtype) for i in (1, 2, 4)]
    ops = backend(hidden.device, dtype)
    with plain(hidden.device):
        for (r0, r1), (v0, v1) in _order(_pieces(n, rows), _pieces(vocab, columns), head_trains):
            hidden_rows = _dense(hidden[r0:r1], dtype)
            a_rows = None if a is None else _dense(a[r0:r1], dtype)
            weight, bias, b = head.slice(v0, v1)
            tile = _logits(hidden_rows, weight, a_rows, b, buffer)
            ops.grad_tile(
                tile,
                bias,
                targets[r0:r1],
                logsumexp[r0:r1],
                None if entropy is None else entropy[r0:r1],
                None if grad_logps is None else grad_logps[r0:r1],
                None if grad_entropy is None else grad_entropy[r0:r1],
                v0,
                spec.transform,
            )
            for total, other in zip(row_sums, (weight, b), strict=True):
                total.add(r0, r1, tile, other, first=v0 == 0, last=v1 == vocab)
            for total, other in zip(head_sums, (hidden_rows, None, a_rows), strict=True):
                total.add(v0, v1, tile.t(), other, first=r0 == 0, last=r1 == n)
    return grads


def scale_rows(
    jac: torch.Tensor,  # [N, H]
    factor: torch.Tensor,  # [N]
) -> torch.Tensor:
    """`factor[:, None] * jac` [N, H] in the dtype of `jac`, without a float32 [N, H] between."""
    out = torch.empty_like(jac)
    if jac.device.type == "cuda":  # one kernel that casts in registers
        return torch.mul(jac, factor.unsqueeze(-1), out=out)
    for r0, r1 in _pieces(jac.shape[0], plan.MAX_ROWS):
        out[r0:r1] = jac[r0:r1] * factor[r0:r1].unsqueeze(-1)
    return out


class _Sum:
    """A float32 sum of products, and the gradient that it is rounded into once, when the last of them is in."""

    def __init__(self, grad: torch.Tensor | None, length: int, unit: torch.Tensor | None, dtype: torch.dtype):
        self.grad = None if grad is None else grad.view(grad.shape[0], -1)  # [M, K]; a bias is [V, 1]
        self.unit = unit
        self.direct = grad is not None and grad.dtype == dtype and unit is None
        self.buffer = None
        if self.grad is not None and not self.direct:
            self.buffer = torch.empty(
                (min(length, len(self.grad)), self.grad.shape[1]), device=grad.device, dtype=dtype
            )
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
    acc: torch.Tensor,  # [M, K] float32
    x: torch.Tensor,  # [M, L]
    y: torch.Tensor,  # [L, K]
    *,
    first: bool,
) -> None:
    """`acc (+)= x @ y`, summed in float32: rounding each tile's product to bf16 first biases training."""
    if _MM_OUT_DTYPE and acc.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16):
        if first:
            torch.mm(x, y, out_dtype=acc.dtype, out=acc)
        else:
            torch.addmm(acc, x, y, out_dtype=acc.dtype, out=acc)
    elif first:
        torch.mm(x.to(acc.dtype), y.to(acc.dtype), out=acc)
    else:
        acc.addmm_(x.to(acc.dtype), y.to(acc.dtype))


def _logits(
    hidden: torch.Tensor,  # [n, H]
    weight: torch.Tensor,  # [w, H]
    a: torch.Tensor | None,  # [n, R]
    b: torch.Tensor | None,  # [w, R]
    buffer: torch.Tensor,  # [rows, columns]
) -> torch.Tensor:
    """`hidden @ weight.T + a @ b.T` [n, w] in the corner of `buffer`; the kernels add the bias, in float32."""
    tile = buffer[: hidden.shape[0], : weight.shape[0]]
    torch.mm(hidden, weight.t(), out=tile)
    if a is not None and b is not None:
        tile.addmm_(a, b.t())
    return tile


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


def _dense(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in `dtype`, copied where BLAS could not take its strides and would copy it again for each tile."""
    x = x.to(dtype)
    rows_first = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    columns_first = x.stride(0) == 1 and x.stride(1) >= x.shape[0]
    return x if rows_first or columns_first else x.contiguous()


def _pieces(total: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def _order(
    row_pieces: list[tuple[int, int]], vocab_pieces: list[tuple[int, int]], vocab_outer: bool
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    if vocab_outer:
        yield from ((rows, columns) for columns in vocab_pieces for rows in row_pieces)
    else:
        yield from ((rows, columns) for rows in row_pieces for columns in vocab_pieces)


@contextlib.contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """No autograd, no autocast (the tiles have their dtype already), and Triton launching on the tensors' own GPU."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), on_device:
        yield
