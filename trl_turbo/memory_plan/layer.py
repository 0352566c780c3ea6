"""What the backward of one layer takes on a device, in bytes, by what its code keeps and makes.

Counted from the code: transformers' (norms in float32, sdpa), PEFT's and torch's autograd, or ours where a feature is
on. The two moments at which a layer takes most are its MLP's backward, with everything kept, and its attention's, with
the MLP's part given back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from trl_turbo.kernels.lora import mlp as lora_tiles
from trl_turbo.memory_plan.sizes import Linear, Sizes

FP32 = 4
#: The most rows that the MLP takes at a time where `mlp_tiling` is on.
TILE_ROWS = 8192


@dataclass(frozen=True)
class Layer:
    """Bytes of one layer.

    Attributes:
        kept: What its forward keeps for backward.
        peak: What its forward and backward take at most, kept included.
    """

    kept: int
    peak: int


def layer_bytes(
    sizes: Sizes, tokens: int, features: Collection[str], *, repeated_kv: bool = False, recomputed: bool = False
) -> Layer:
    """What one layer takes.

    Args:
        sizes: The model.
        tokens: Of the micro-batch.
        features: Features of `patch()` that are on.
        repeated_kv: Whether keys and values are repeated for each query head, as sdpa needs them under a mask.
        recomputed: Whether it is made again for backward, by gradient checkpointing.
    """
    c = sizes.itemsize
    stream = 2 * c * sizes.hidden  # the gradient that comes in, and the one that goes out
    around = _around(sizes, features) + _attention(sizes, repeated_kv)
    # The layer's own input, made again from nothing: our first norm keeps it, transformers' keeps a copy in float32
    given = 0 if "norms" in features else c * sizes.hidden
    inner_kept, inner_work = _inner(sizes, features)
    rows = tokens
    if recomputed and sizes.inner and "lora" in features and sizes.has_adapters:
        # Our MLP keeps its input alone then, and three tiles at a time are in use
        rows = min(tokens, max(lora_tiles.LEAST_ROWS, lora_tiles.TILE_BYTES // (c * sizes.inner)))
        inner_kept, inner_work = 0, 3 * c * sizes.inner
    elif recomputed and sizes.inner and "mlp_tiling" in features and tokens > TILE_ROWS:
        rows = TILE_ROWS
    mlp = tokens * (given + around + stream) + rows * (inner_kept + inner_work)
    attention = tokens * (given + around + stream + _attention_work(sizes, features, repeated_kv))
    dense = c * sizes.largest_linear if sizes.packed else 0
    return Layer(
        kept=tokens * around + (tokens * inner_kept if rows == tokens else 0),
        peak=max(mlp, attention) + dense,
    )


def _around(sizes: Sizes, features: Collection[str]) -> int:
    """Norms and the inputs of linears, a token, without what is as wide as the MLP's inside."""
    c = sizes.itemsize
    full = not sizes.has_adapters
    if "norms" in features:
        total = sum(sizes.norms) * c + FP32 * len(sizes.norms)  # the first one's input is the layer's
    else:
        total = FP32 * sum(sizes.norms)
        if full:
            total += c * sum(sizes.norms)  # normed, for the gradient of the weight
    for group in sizes.groups:
        if sizes.experts and group[-1].outputs == sizes.hidden and group[-1].inputs != sizes.heads:
            continue  # an expert, see the notes
        *firsts, last = group
        if firsts:
            total += _inputs(tuple(firsts), sizes, features)
        if last.inputs != sizes.inner:
            # What attention gave is kept by attention; a copy in the adapter's dtype is not the same tensor
            total += c * last.inputs if last.rank and _copies(sizes, features) else 0
    if sizes.has_adapters:
        total += sum(sizes.itemsize * linear.rank for linear in sizes.linears)
    return total


def _inputs(linears: tuple[Linear, ...], sizes: Sizes, features: Collection[str]) -> int:
    """What linears of one input keep of it."""
    c, width = sizes.itemsize, linears[0].inputs
    adapted = sum(1 for linear in linears if linear.rank)
    if not sizes.has_adapters:
        return c * width
    if not adapted:
        return 0
    return c * width * (adapted if _copies(sizes, features) else 1)


def _copies(sizes: Sizes, features: Collection[str]) -> bool:
    """Whether each adapter keeps a copy of its input: PEFT casts it to float32, and autocast back."""
    return sizes.has_adapters and "lora" not in features and sizes.adapter_itemsize != sizes.itemsize


def _attention(sizes: Sizes, repeated_kv: bool) -> int:
    """Queries, keys, values, the output and the logsumexp."""
    kv = sizes.heads if repeated_kv else sizes.kv
    return sizes.itemsize * (2 * sizes.heads + 2 * kv) + FP32 * sizes.queries


def _attention_work(sizes: Sizes, features: Collection[str], repeated_kv: bool) -> int:
    """Gradients of all four, and that of the queries in float32, in which it is summed."""
    kv = sizes.heads if repeated_kv else sizes.kv
    work = sizes.itemsize * (2 * sizes.heads + 2 * kv) + FP32 * sizes.heads
    return work + (FP32 * sizes.hidden if _copies(sizes, features) else 0)


def _inner(sizes: Sizes, features: Collection[str]) -> tuple[int, int]:
    """What the MLP keeps inside, and what its backward makes beside it, a token."""
    c, inner = sizes.itemsize, sizes.inner
    if not inner:
        return 0, 0
    last = next(group[-1] for group in sizes.groups if group[-1].inputs == inner)
    if "lora" in features and sizes.has_adapters:
        # gate and up; then the gradient of the product, the product again, and the gradients of both halves
        return 2 * c * inner, 4 * c * inner
    kept = (2 if "mlp" in features else 3) * c * inner  # gate and up; act(gate) as well without our op
    if last.rank or not sizes.has_adapters:
        kept += c * inner  # the last linear's input
    work = 2 * c * inner  # three gradients as wide, the last linear's input given back
    if last.rank and _copies(sizes, features):
        work = (FP32 + 2 * c) * inner  # the adapter's gradient of its input in float32, rounded, and the base's
    return kept, work
