"""The public function."""

from __future__ import annotations

import torch

from .reference import paged_decode_reference
from .spec import Rotation, Step

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Query heads of one key-value head that a program takes.
MOST_HEADS = 64
MOST_DIM = 256


@torch.no_grad()
def paged_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    slots: torch.Tensor,
    *,
    scale: float,
    rotation: Rotation | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    length: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from one new token of each sequence to all of it, and write the token into the cache on the way.

    On a GPU in one launch: several programs share a sequence's cache, and the one that is done last joins their parts,
    always in the same order. Paged attention: https://arxiv.org/abs/2309.06180; splitting the cache:
    https://crfm.stanford.edu/2023/10/12/flashdecoding.html

    Args:
        query: [B, Hq, D], with the columns of a head next to each other.
        key: [B, Hk, D] of the new tokens, in the same way; Hq is a multiple of Hk.
        value: [B, Hk, D].
        key_cache: [blocks, block size, Hk, D], in any order of the first three. Row `slots[b]` (block times block size
            plus place) gets the new, rotated key.
        value_cache: As `key_cache`.
        block_table: [B, most blocks], int32: where a sequence's blocks are.
        seq_lens: [B], int32, the new token counted; 0 for a row that is padding, whose result means nothing.
        slots: [B], int64; negative: the row's token is not kept.
        scale: What scores are multiplied by.
        rotation: What queries and keys are turned by before; `None` where they are already.
        window: How many tokens one sees, itself counted; `None` for all.
        softcap: Scores s become softcap * tanh(s / softcap); 0 for none.
        length: Tokens that a sequence has as a rule, by which the kernel's tile is chosen; many, where it is `None`.
        out: [B, Hq, D], contiguous, to write to.

    Returns:
        [B, Hq, D] in the query's dtype.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    step = Step(
        query, key, value, key_cache, value_cache, block_table, seq_lens, slots, scale, rotation, window, softcap
    )
    _check(step)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not query.is_cuda:
        return out.copy_(paged_decode_reference(step))
    from .kernel import paged_decode_triton

    return paged_decode_triton(step, out, length=length)


def _check(step: Step) -> None:
    query, key, value, key_cache, value_cache, block_table, seq_lens, slots, *_ = step
    rows, heads, dim = query.shape
    kv_heads = key.shape[1]
    if key.shape != (rows, kv_heads, dim) or value.shape != key.shape or heads % kv_heads:
        raise ValueError(
            f"paged_decode takes a query [B, Hq, D] and key and value [B, Hk, D], Hq a multiple of Hk; found "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    if key_cache.shape != value_cache.shape or key_cache.shape[2:] != key.shape[1:]:
        raise ValueError(
            f"caches are [blocks, block size, {kv_heads}, {dim}]; found {list(key_cache.shape)} and "
            f"{list(value_cache.shape)}"
        )
    if len({x.dtype for x in (query, key, value, key_cache, value_cache)}) > 1 or query.dtype not in DTYPES:
        raise ValueError(
            f"query, key, value and caches share one of float32, float16 and bfloat16; found {query.dtype}, "
            f"{key.dtype}, {value.dtype}, {key_cache.dtype} and {value_cache.dtype}"
        )
    if block_table.shape[0] != rows or seq_lens.shape != (rows,) or slots.shape != (rows,):
        raise ValueError(
            f"block_table, seq_lens and slots have {rows} rows; found {list(block_table.shape)}, "
            f"{list(seq_lens.shape)} and {list(slots.shape)}"
        )
    if heads // kv_heads > MOST_HEADS or dim > MOST_DIM:
        raise ValueError(
            f"up to {MOST_HEADS} query heads a key-value head and {MOST_DIM} columns are supported; found "
            f"{heads // kv_heads} and {dim}"
        )
