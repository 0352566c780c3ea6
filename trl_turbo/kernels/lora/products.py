"""The products of linears that share an input, forward and backward, without autograd.

Adapters lie side by side: `low` [N, R] has dropout(x) @ lora_A.T * scaling of each in its columns, and `high` [N, R]
has grad @ lora_B * scaling. Both have the scaling in them, so that none of the products with them is followed by one
with a number, which is a launch. No [out, in] of an adapter is ever formed, and no [N, in] for each of them is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .casts import Cast
from .dropout import drop, replay
from .spec import Adapter, Linears, to

#: For each adapter the generator's state before its dropout, `None` where nothing was dropped
States = tuple[torch.Tensor | None, ...]
Grads = Sequence[torch.Tensor | None]
# torch.mm(..., out_dtype=): from torch 2.8 on, on CUDA
_GIVES_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads()
# What a product is added to with beta=0, which is not read: one for a device and a dtype
_unread: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def forward(
    x: torch.Tensor, linears: Linears, cast: Cast, *, training: bool
) -> tuple[list[torch.Tensor], torch.Tensor, States]:
    """Outputs [N, out] of each projection, `low` [N, R] and the states of dropout.

    Args:
        x: [N, in], contiguous.
        linears: Of this input.
        cast: Their adapters.
        training: Whether a backward pass follows.
    """
    outputs = bases(x, linears, training=training)
    low, states = narrow(x, linears, cast)
    return add_adapters(outputs, low, linears, cast), low, states


def bases(x: torch.Tensor, linears: Linears, *, training: bool) -> list[torch.Tensor]:
    """What the frozen linears alone make of x [N, in]: [N, out] each.

    To be asked for before what is small, whose launches the host then makes while the device is busy.
    """
    return [projection.base.product(x, training=training) for projection in linears.projections]


def add_adapters(outputs: list[torch.Tensor], low: torch.Tensor, linears: Linears, cast: Cast) -> list[torch.Tensor]:
    """The adapters' part on top of what the frozen linears gave, written over them where dtypes allow.

    Args:
        outputs: [N, out] of each projection's base.
        low: [N, R], from `narrow`.
        linears: Of one input.
        cast: Their adapters.
    """
    found, compute, parts = [], linears.compute, zip(_parts(low, linears), cast.b, strict=True)
    for y, projection in zip(outputs, linears.projections, strict=True):
        result = projection.result
        added: torch.Tensor | None = y if y.dtype == compute == result else None
        for _ in projection.adapters:
            a, b = next(parts)
            added = torch.mm(a, b.t()) if added is None else added.addmm_(a, b.t())
        if added is None:
            found.append(to(y, result))
        else:
            found.append(y if added is y else to(torch.add(y, added), result))
    return found


def input_gradient(
    dtype: torch.dtype,
    linears: Linears,
    grads: Grads,
    states: States,
    cast: Cast,
    *,
    wanted: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradient of x, [N, in] in `dtype` and `None` unless wanted, and `high` [N, R].

    Args:
        dtype: Of x.
        linears: As in forward.
        grads: Of each output, [N, out], or `None`; not all of them `None`.
        states: From forward.
        cast: Their adapters.
        wanted: Whether x has a gradient.
    """
    compute, adapters = linears.compute, linears.adapters
    high = _high(linears, grads, cast)
    if not wanted:
        return None, high
    dropped = linears.drops and any(state is not None for state in states)
    summands = [(grad, p.base) for grad, p in zip(grads, linears.projections, strict=True) if grad is not None]
    # Each sum is rounded: what is small comes first, the adapters' part and then narrow linears
    if len(summands) > 1:
        summands.sort(key=lambda summand: summand[0].shape[1])
    first = not dropped and compute == dtype and all(base.dtype == compute for _, base in summands)
    found = torch.mm(high, cast.a) if adapters and first else None
    for grad, base in summands:
        if found is None or found.dtype == base.dtype:
            found = base.add_gradient(grad, found)
        else:
            found = found + base.add_gradient(grad, None)
    assert found is not None
    found = to(found, dtype)
    if not dropped:
        return (found.add_(high @ cast.a) if adapters and not first else found), high
    for adapter, state, columns, part in zip(adapters, states, linears.columns, _parts(high, linears), strict=True):
        added = part @ cast.a[columns]
        if state is not None:
            added = replay(to(added, adapter.lora_A.dtype), adapter.dropout, state)
        found.add_(added)
    return found, high


def adapter_gradients(
    x: torch.Tensor | None,
    linears: Linears,
    grads: Grads,
    low: torch.Tensor,
    high: torch.Tensor,
    states: States,
    wanted: Sequence[bool],
    *,
    parts: bool = False,
) -> list[torch.Tensor | None]:
    """Gradients of lora_A [r, in] and lora_B [out, r] of each adapter, in turn; `None` where not wanted.

    In float32 where the device can give what it sums in and that is not rounded again at once; else in the dtype of the
    products.

    Args:
        x: [N, in], contiguous; `None` where no lora_A has a gradient.
        linears: As in forward.
        grads: Of each output, [N, out], or `None`.
        low: [N, R], from forward.
        high: [N, R], from `input_gradient`.
        states: From forward.
        wanted: Of each lora_A and lora_B in turn.
        parts: Whether these rows are some of several, whose gradients are added up.
    """
    compute = linears.compute
    wide = parts or not linears.rounded
    of_output = [grad for p, grad in zip(linears.projections, grads, strict=True) for _ in p.adapters]
    if any(grad is None for grad in grads):
        wanted = [w and of_output[i // 2] is not None for i, w in enumerate(wanted)]
    found: list[torch.Tensor | None] = [None] * len(wanted)
    if x is not None and any(wanted[::2]):
        if linears.drops and any(state is not None for state in states):
            draws = zip(_parts(high, linears), linears.adapters, states, wanted[::2], strict=True)
            found[::2] = [
                summed(part.t(), _dropped(x, adapter, state, compute), wide=wide) if w else None
                for part, adapter, state, w in draws
            ]
        else:
            of_all = summed(high.t(), to(x, compute), wide=wide)  # [R, in]
            of_a = (of_all,) if len(linears.adapters) == 1 else of_all.split_with_sizes(linears.ranks)
            found[::2] = [part if w else None for part, w in zip(of_a, wanted[::2], strict=True)]
    if any(wanted[1::2]):
        narrows = zip(of_output, _parts(low, linears), wanted[1::2], strict=True)
        found[1::2] = [
            summed(to(g, compute).t(), part, wide=wide) if w and g is not None else None for g, part, w in narrows
        ]
    return found


def in_dtypes(
    gradients: Sequence[torch.Tensor | None], parameters: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """What `adapter_gradients` gave, or a sum of it, in the dtypes of the adapters."""
    return [None if g is None else to(g, t.dtype) for g, t in zip(gradients, parameters, strict=True)]


def narrow(x: torch.Tensor, linears: Linears, cast: Cast) -> tuple[torch.Tensor, States]:
    """`low` [N, R] of x [N, in], and the states of dropout."""
    adapters, compute = linears.adapters, linears.compute
    if not linears.drops:
        if not adapters:
            return x.new_empty((x.shape[0], 0), dtype=compute), ()
        if linears.scaling is not None:
            return scaled(to(x, compute), cast.a.t(), linears.scaling), (None,) * len(adapters)
    low = x.new_empty((x.shape[0], linears.rank), dtype=compute)
    states: list[torch.Tensor | None] = []
    for adapter, columns in zip(adapters, linears.columns, strict=True):
        a, state = x, None
        if adapter.dropout:
            a, state = drop(to(x, adapter.lora_A.dtype), adapter.dropout)
        scaled(to(a, compute), cast.a[columns].t(), adapter.scaling, out=low[:, columns])
        states.append(state)
    return low, tuple(states)


def _parts(columns: torch.Tensor, linears: Linears) -> list[torch.Tensor]:
    """[N, r] of each adapter, of `low` or `high` [N, R]."""
    if len(linears.adapters) == 1:
        return [columns]
    return list(columns.split_with_sizes(linears.ranks, 1))


def _high(linears: Linears, grads: Grads, cast: Cast) -> torch.Tensor:
    compute = linears.compute
    if len(grads) == len(linears.adapters) == 1 and grads[0] is not None:
        (adapter,) = linears.adapters
        return scaled(to(grads[0], compute), cast.b[0], adapter.scaling)
    first = next(grad for grad in grads if grad is not None)
    high = first.new_empty((first.shape[0], linears.rank), dtype=compute)
    parts = zip(_parts(high, linears), cast.b, strict=True)
    for projection, grad in zip(linears.projections, grads, strict=True):
        for adapter in projection.adapters:
            part, b = next(parts)
            if grad is None:
                part.zero_()
            else:
                scaled(to(grad, compute), b, adapter.scaling, out=part)
    return high


def _dropped(x: torch.Tensor, adapter: Adapter, state: torch.Tensor | None, compute: torch.dtype) -> torch.Tensor:
    if state is None:
        return to(x, compute)
    return to(replay(to(x, adapter.lora_A.dtype), adapter.dropout, state), compute)


def scaled(a: torch.Tensor, b: torch.Tensor, scaling: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """scaling * a @ b, rounded once."""
    key = a.device, a.dtype
    unread = _unread.get(key)
    if unread is None:
        unread = _unread[key] = a.new_zeros((1, 1))
    return torch.addmm(unread, a, b, beta=0, alpha=scaling, out=out)


def summed(a: torch.Tensor, b: torch.Tensor, *, wide: bool) -> torch.Tensor:
    """a @ b over many rows; `wide` not rounded to 16 bits where the device gives back what it sums in."""
    if wide and _GIVES_FLOAT32 and a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)
