"""The products of linears that share an input, forward and backward, without autograd.

Adapters lie side by side: `low` [N, R] has dropout(x) @ lora_A.T of each in its columns, and `high` [N, R] has
grad @ lora_B * scaling. No [out, in] of an adapter is ever formed, and no [N, in] for each of them is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .dropout import drop, replay
from .spec import Adapter, Projections, adapters_of

#: For each adapter the generator's state before its dropout, `None` where nothing was dropped
States = tuple[torch.Tensor | None, ...]
Grads = Sequence[torch.Tensor | None]
# torch.mm(..., out_dtype=): from torch 2.8 on, on CUDA
_GIVES_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads()


def forward(
    x: torch.Tensor, projections: Projections, *, training: bool
) -> tuple[list[torch.Tensor], torch.Tensor, States]:
    """Outputs [N, out] of each projection, `low` [N, R] and the states of dropout.

    Args:
        x: [N, in], contiguous.
        projections: Linears of this input.
        training: Whether a backward pass follows.
    """
    low, states = narrow(x, projections)
    outputs = [projection.base.product(x, training=training) for projection in projections]
    return add_adapters(outputs, low, projections), low, states


def add_adapters(outputs: list[torch.Tensor], low: torch.Tensor, projections: Projections) -> list[torch.Tensor]:
    """The adapters' part on top of what the frozen linears gave, written over them where dtypes allow.

    Args:
        outputs: [N, out] of each projection's base.
        low: [N, R], from `narrow`.
        projections: Linears of one input.
    """
    found, columns = [], _columns(projections)
    for y, projection in zip(outputs, projections, strict=True):
        compute = projection.compute
        added: torch.Tensor | None = y if y.dtype == compute == projection.result else None
        for adapter in projection.adapters:
            a, b = low[:, next(columns)], adapter.lora_B.to(compute).t()
            added = _scaled(a, b, adapter.scaling) if added is None else added.addmm_(a, b, alpha=adapter.scaling)
        found.append(y.to(projection.result) if added is None else _sum(y, added, projection.result))
    return found


def input_gradient(
    dtype: torch.dtype, projections: Projections, grads: Grads, states: States, *, wanted: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradient of x, [N, in] in `dtype` and `None` unless wanted, and `high` [N, R].

    Args:
        dtype: Of x.
        projections: As in forward.
        grads: Of each output, [N, out], or `None`; not all of them `None`.
        states: From forward.
        wanted: Whether x has a gradient.
    """
    compute, adapters = projections[0].compute, adapters_of(projections)
    high = _high(projections, grads, compute)
    if not wanted:
        return None, high
    dropped = any(state is not None for state in states)
    summands = [(grad, p.base) for grad, p in zip(grads, projections, strict=True) if grad is not None]
    # Each sum is rounded: what is small comes first, the adapters' part and then narrow linears
    summands.sort(key=lambda summand: summand[0].shape[1])
    first = not dropped and compute == dtype and all(base.dtype == compute for _, base in summands)
    found = high @ _stacked(adapters, compute) if adapters and first else None
    for grad, base in summands:
        if found is None or found.dtype == base.dtype:
            found = base.add_gradient(grad, found)
        else:
            found = found + base.add_gradient(grad, None)
    assert found is not None
    if not dropped:
        found = found.to(dtype)
        return (found.add_(high @ _stacked(adapters, compute)) if adapters and not first else found), high
    found = found.to(dtype)
    for adapter, state, columns in zip(adapters, states, _columns(projections), strict=True):
        added = high[:, columns] @ adapter.lora_A.to(compute)
        if state is not None:
            added = replay(added.to(adapter.lora_A.dtype), adapter.dropout, state)
        found.add_(added)
    return found, high


def adapter_gradients(
    x: torch.Tensor | None,
    projections: Projections,
    grads: Grads,
    low: torch.Tensor,
    high: torch.Tensor,
    states: States,
    wanted: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of lora_A [r, in] and lora_B [out, r] of each adapter, in turn; `None` where not wanted.

    In float32 where the device can give what it sums in, for their sum over tiles; else in the dtype of the products.

    Args:
        x: [N, in], contiguous; `None` where no lora_A has a gradient.
        projections: As in forward.
        grads: Of each output, [N, out], or `None`.
        low: [N, R], from forward.
        high: [N, R], from `input_gradient`.
        states: From forward.
        wanted: Of each lora_A and lora_B in turn.
    """
    compute, adapters = projections[0].compute, adapters_of(projections)
    of_output = [grad for projection, grad in zip(projections, grads, strict=True) for _ in projection.adapters]
    found: list[torch.Tensor | None] = []
    together = None
    plain = x is not None and not any(state is not None for state in states)
    if x is not None and plain and any(wanted[::2]):
        together = _summed(high.t(), x.to(compute))  # [R, in]
    for i, (adapter, state, columns) in enumerate(zip(adapters, states, _columns(projections), strict=True)):
        grad, (of_a, of_b) = of_output[i], wanted[2 * i : 2 * i + 2]
        if not of_a or grad is None or x is None:
            found.append(None)
        elif together is not None:
            found.append(together[columns])
        else:
            found.append(_summed(high[:, columns].t(), _dropped(x, adapter, state, compute)))
        if not of_b or grad is None:
            found.append(None)
        else:
            found.append(_summed(grad.to(compute).t(), low[:, columns], adapter.scaling))
    return found


def in_dtypes(gradients: Sequence[torch.Tensor | None], projections: Projections) -> list[torch.Tensor | None]:
    """What `adapter_gradients` gave, or a sum of it, in the dtypes of the adapters."""
    tensors = [tensor for adapter in adapters_of(projections) for tensor in adapter[:2]]
    return [None if g is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True)]


def narrow(x: torch.Tensor, projections: Projections) -> tuple[torch.Tensor, States]:
    """`low` [N, R] of x [N, in], and the states of dropout."""
    adapters, compute = adapters_of(projections), projections[0].compute
    if not any(adapter.dropout for adapter in adapters):
        if not adapters:
            return x.new_empty((x.shape[0], 0), dtype=compute), ()
        return x.to(compute) @ _stacked(adapters, compute).t(), (None,) * len(adapters)
    low = x.new_empty((x.shape[0], sum(adapter.rank for adapter in adapters)), dtype=compute)
    states: list[torch.Tensor | None] = []
    start = 0
    for adapter in adapters:
        a, state = x, None
        if adapter.dropout:
            a, state = drop(x.to(adapter.lora_A.dtype), adapter.dropout)
        torch.mm(a.to(compute), adapter.lora_A.to(compute).t(), out=low[:, start : start + adapter.rank])
        states.append(state)
        start += adapter.rank
    return low, tuple(states)


def _high(projections: Projections, grads: Grads, compute: torch.dtype) -> torch.Tensor:
    first = next(grad for grad in grads if grad is not None)
    rows, columns = first.shape[0], _columns(projections)
    adapters = adapters_of(projections)
    high = first.new_empty((rows, sum(adapter.rank for adapter in adapters)), dtype=compute)
    for projection, grad in zip(projections, grads, strict=True):
        for adapter in projection.adapters:
            part = high[:, next(columns)]
            if grad is None:
                part.zero_()
            else:
                _scaled(grad.to(compute), adapter.lora_B.to(compute), adapter.scaling, out=part)
    return high


def _dropped(x: torch.Tensor, adapter: Adapter, state: torch.Tensor | None, compute: torch.dtype) -> torch.Tensor:
    if state is None:
        return x.to(compute)
    return replay(x.to(adapter.lora_A.dtype), adapter.dropout, state).to(compute)


def _stacked(adapters: list[Adapter], compute: torch.dtype) -> torch.Tensor:
    """lora_A of all, [R, in]."""
    if len(adapters) == 1:
        return adapters[0].lora_A.to(compute)
    return torch.cat([adapter.lora_A for adapter in adapters]).to(compute)


def _scaled(a: torch.Tensor, b: torch.Tensor, scaling: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """scaling * a @ b, rounded once."""
    # With beta=0 what it would be added to is not read
    unread = a.new_empty((1, 1))
    return torch.addmm(unread, a, b, beta=0, alpha=scaling, out=out)


def _summed(a: torch.Tensor, b: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """scaling * a @ b over many rows: not rounded to 16 bits where the device gives back what it sums in."""
    if a.is_cuda and a.dtype.itemsize == 2 and _GIVES_FLOAT32:
        product = torch.mm(a, b, out_dtype=torch.float32)
        return product if scaling == 1.0 else product.mul_(scaling)
    return _scaled(a, b, scaling)


def _sum(y: torch.Tensor, added: torch.Tensor, result: torch.dtype) -> torch.Tensor:
    return added if added is y else torch.add(y, added).to(result)


def _columns(projections: Projections) -> Iterator[slice]:
    start = 0
    for adapter in adapters_of(projections):
        yield slice(start, start + adapter.rank)
        start += adapter.rank
