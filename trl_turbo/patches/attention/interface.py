"""Our attention as transformers calls one, and the name it is registered under."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn

from trl_turbo.kernels.attention import Segments, attention
from trl_turbo.patches.attention.layout import KEYWORD, NAME, Layout, Onlookers

# What transformers hands to an attention beside the tensors, and what needs no answer
_IDLE = frozenset({"position_ids", "cache_position", "position_embeddings"})


class UnsupportedAttentionError(NotImplementedError):
    """An attention that our kernel does not compute."""


def register() -> None:
    """Enter our attention, and the masks of those of its calls that have no layout, under its name."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    # A call without a layout is sdpa's, with sdpa's mask; with a layout the model makes no mask at all
    AttentionMaskInterface.register(NAME, sdpa_mask)


def unregister() -> None:
    """Take the name out again."""
    for module, kind in (("masking_utils", "AttentionMaskInterface"), ("modeling_utils", "AttentionInterface")):
        interface = getattr(sys.modules.get(f"transformers.{module}"), kind, None)
        if interface is not None:
            interface._global_mapping.pop(NAME, None)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # [B, Hq, L, D]
    key: torch.Tensor,  # [B, Hkv, L, D]
    value: torch.Tensor,  # [B, Hkv, L, D]
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over the layout in the keywords; what has none is computed where it is plainly causal, or by sdpa.

    Returns:
        `[B, L, Hq, D]` and no weights.

    Raises:
        UnsupportedAttentionError: Something else than causal attention, a window and a softcap is asked for.
    """
    layout: Layout | None = kwargs.pop(KEYWORD, None)
    if layout is None:
        return _without_layout(module, query, key, value, attention_mask, dropout, scaling, kwargs), None
    refuse(module, query, key, value, dropout, kwargs)
    layout.calls += 1
    softcap = kwargs.get("softcap") if layout.softcap else None
    return over_layout(query, key, value, layout, scaling, kwargs.get("sliding_window"), softcap), None


def over_layout(
    query: torch.Tensor,  # [B, Hq, L, D]
    key: torch.Tensor,  # [B, Hkv, L, D]
    value: torch.Tensor,  # [B, Hkv, L, D]
    layout: Layout,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention `[B, L, Hq, D]` over a layout; zero where the layout has no token."""
    batch, heads, length, width = query.shape
    # Queries and keys may have come out of float32 angles; matrix products of autocast round them, sdpa too
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2).reshape(batch * length, -1, width) for x in (query, key, value))
    if layout.index is not None:
        q, k, v = (x.index_select(0, layout.index) for x in (q, k, v))
    tokens, deterministic = layout.segments.total, torch.are_deterministic_algorithms_enabled()
    form: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "deterministic": deterministic}
    if layout.onlookers is None:
        found = attention(q, k, v, layout.segments, **form)
    else:
        found = attention(q[:tokens], k[:tokens], v[:tokens], layout.segments, **form)
        found = torch.cat((found, _look_on(q, k, v, layout.onlookers, tokens, scale, softcap)))
    if layout.index is not None:
        found = found.new_zeros(batch * length, heads, width).index_copy(0, layout.index, found)
    return found.reshape(batch, length, heads, width)


def _look_on(
    query: torch.Tensor,  # [T + P, Hq, D]
    key: torch.Tensor,  # [T + P, Hkv, D]
    value: torch.Tensor,  # [T + P, Hkv, D]
    onlookers: Onlookers,
    tokens: int,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """What the onlookers see, `[P, Hq, D]`: a padded batch of them, by sdpa."""
    mine = query[tokens:][onlookers.queries].transpose(1, 2)  # [B, Hq, M, D]
    keys, values = (x[onlookers.keys].transpose(1, 2) for x in (key, value))  # [B, Hkv, L, D]
    mask = onlookers.seen[:, None, None]
    if softcap is None:
        keys, values = (x.repeat_interleave(mine.shape[1] // x.shape[1], 1) for x in (keys, values))
        found = nn.functional.scaled_dot_product_attention(mine, keys, values, attn_mask=mask, scale=scale)
        found = found.transpose(1, 2)
    else:
        found = _capped(mine, keys, values, mask, scale, softcap)
    return found.flatten(0, 1).index_select(0, onlookers.back)


def refuse(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    kwargs: dict[str, Any],
) -> None:
    """Raise where a call asks for what the kernel does not compute.

    Whether it is causal its mask says, not `is_causal`, which is for calls without a mask (GPT-2 says no beside one).
    """
    if dropout:
        raise UnsupportedAttentionError(f"it drops out {dropout} of its attention weights")
    if query.shape[2] != key.shape[2]:
        raise UnsupportedAttentionError(f"{query.shape[2]} queries attend to {key.shape[2]} keys")
    if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        raise UnsupportedAttentionError(
            f"its values have {value.shape[-1]} columns a head and its keys {key.shape[-1]}, as latent attention has"
        )
    if kwargs.get("s_aux") is not None or getattr(module, "sinks", None) is not None:
        raise UnsupportedAttentionError("it has attention sinks")
    for name, given in kwargs.items():
        if isinstance(given, torch.Tensor) and name not in _IDLE:
            raise UnsupportedAttentionError(f"it hands `{name}` to its attention")


def _without_layout(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    softcap, batch, length = kwargs.get("softcap"), query.shape[0], query.shape[2]
    # sdpa's mask is left out where it is all of what is causal, a window within it included
    if mask is None and length > 1 and key.shape[2] == length and not dropout and _plain(module, query, value, kwargs):
        layout = Layout(equal_segments(batch, length, query.device))
        return over_layout(query, key, value, layout, scaling, None, softcap)
    if kwargs.get("s_aux") is not None:
        raise UnsupportedAttentionError(
            f"{type(module).__name__} has attention sinks, which attn_implementation={NAME!r} does not compute; "
            "load the model with attn_implementation='eager'."
        )
    if softcap is not None:
        return _capped(query, key, value, mask, scaling, softcap, dropout if module.training else 0.0)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)[0]


def _plain(module: nn.Module, query: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    if torch.compiler.is_compiling() or not (getattr(module, "is_causal", True) if causal is None else causal):
        return False
    try:
        refuse(module, query, query, value, 0.0, kwargs)
    except UnsupportedAttentionError:
        return False
    return True


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention with a softcap where there is no layout: a step of decoding, or a padded batch. All in memory."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif query.shape[2] > 1:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous()


@functools.lru_cache(maxsize=8)
def equal_segments(batch: int, length: int, device: torch.device) -> Segments:
    """A batch of rows without padding, for which attention may have a faster kernel than over sequences."""
    return Segments.build([length] * batch, device=device)
