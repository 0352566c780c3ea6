"""Attention of small decode batches, with what stands around it in a layer, as one kernel of ours.

Of 2.0 ms that a decode step of a 1.5B model took for 8 sequences on an H200, 0.5 were FlashAttention 3 with its join,
the rotary embedding and the write to the cache: four kernels a layer that move a few kilobytes each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from trl_turbo.engine.decode_batch import decodes, runs, unexpected
from trl_turbo.engine.decode_probe import misbehaves
from trl_turbo.kernels.paged_attention import Rotation, paged_decode
from trl_turbo.kernels.paged_attention.op import DTYPES, MOST_DIM, MOST_HEADS
from trl_turbo.report import note

#: Tokens, of all sequences and key-value heads, up to which the kernel is known to be faster than what it stands for:
#: with 8 sequences of up to 16,384 tokens, and 2 or 8 heads of 128, on an H200.
MOST_CACHED = 1_048_576


def _layers(model: Any) -> dict[str, Any]:
    """A model's attention layers by name.

    Raises:
        ImportError, AttributeError: This vLLM has not all that is used here.
    """
    from vllm.model_executor.layers.attention.attention import Attention, get_attention_context  # noqa: F401
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    RotaryEmbedding._match_cos_sin_cache_dtype  # noqa: B018
    return {name: module for name, module in model.named_modules() if isinstance(module, Attention)}


def _unfit(model: Any, layers: dict[str, Any]) -> str | None:
    """Say why no graph of this model takes the kernel, or return `None`."""
    if not layers:
        return "the model has no attention layer of vLLM's"
    reason = next(filter(None, map(_unfit_layer, layers.values())), None)
    if reason is not None:
        return reason
    device = next(model.parameters()).device
    forms = {(x.num_heads, x.num_kv_heads, x.head_size, x.impl.logits_soft_cap): x for x in layers.values()}
    return next(filter(None, (misbehaves(layer, device) for layer in forms.values())), None)


def _unfit_layer(layer: Any) -> str | None:
    """Say what of an attention layer the kernel does not compute, or return `None`."""
    implementation = layer.impl
    if type(implementation).__name__ != "FlashAttentionImpl":
        return f"attention is {type(implementation).__name__}, and FlashAttentionImpl is what was looked at"
    if layer.kv_cache_dtype != "auto" and getattr(layer, "kv_cache_torch_dtype", None) != layer.dtype:
        return f"the KV cache is {layer.kv_cache_dtype}"
    wanted = {
        "alibi_slopes": None,
        "sinks": None,
        "kv_sharing_target_layer_name": None,
        "dcp_world_size": 1,
    }
    for name, value in wanted.items():
        found = getattr(implementation, name, value)
        if found is not value and found != value:
            return f"attention has {name}"
    if str(implementation.attn_type).rpartition(".")[2].lower() != "decoder":
        return f"attention is of type {implementation.attn_type}"
    if layer.query_quant is not None or layer.calculate_kv_scales:
        return "queries or the cache are quantised"
    if layer.head_size > MOST_DIM or layer.head_size_v != layer.head_size:
        return f"a head has {layer.head_size} columns"
    if layer.num_heads > MOST_HEADS * layer.num_kv_heads or layer.dtype not in DTYPES:
        return f"{layer.num_heads} query heads share {layer.num_kv_heads}, in {layer.dtype}"
    return None


class Attention:
    """The attention layers of a model of vLLM's.

    Args:
        model: vLLM's.
        length: Tokens that a sequence has on average while it is sampled.

    Attributes:
        declined: Why they keep vLLM's kernels, in a sentence; `None` where they do not.
    """

    def __init__(self, model: Any, length: int) -> None:
        layers: dict[str, Any] = {}
        try:
            layers = _layers(model)
            reason = _unfit(model, layers)
        except (ImportError, AttributeError) as error:
            reason = f"this vLLM's attention is not as expected ({error})"
        self.declined = (
            None if reason is None else f"decode steps run vLLM's attention and not our one kernel: {reason}"
        )
        self._model = model
        self._length = length
        self._layers = {} if reason is not None else layers
        self._seen: dict[int, set[str]] = {}
        self._long = False
        self._waiting: _Turn | None = None
        self._kept: set[int] = set()  # rotary embeddings whose queries are touched before attention

    @property
    def sizes(self) -> set[int]:
        """Sizes of batches that run the kernel in every layer."""
        return {size for size, names in self._seen.items() if len(names) == len(self._layers)}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, small decode batches run the kernel."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.enter_context(runs(layer, self._attend(name, layer, layer.forward)))
            for module in self._rotations() if self._layers else ():
                stack.enter_context(runs(module, self._rotate(module, module.forward)))
            yield
        if self._layers and not self._seen and not self._long:
            note("rollout", "decode steps run vLLM's attention: what vLLM says of a batch is not as expected")

    def _rotations(self) -> list[Any]:
        """Rotary embeddings of a kind that the kernel computes, in modules that have an attention layer themselves."""
        from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

        found = {}
        attention = {id(layer) for layer in self._layers.values()}
        for parent in self._model.modules():
            children = list(parent.children())
            if any(id(child) in attention for child in children):
                for child in children:
                    ours = isinstance(child, RotaryEmbedding)
                    if ours and type(child).forward_cuda is RotaryEmbedding.forward_cuda:
                        found[id(child)] = child
        return list(found.values())

    def _is_long(self, pairs: int) -> bool:
        """Whether the cache of so many sequences and key-value heads is larger than any that was measured."""
        if pairs * self._length <= MOST_CACHED:
            return False
        self._long = True
        note(
            "rollout",
            "decode steps of many long sequences run vLLM's attention, because our one kernel is known to be faster up "
            f"to {MOST_CACHED:,} tokens of all key-value heads; half of max_model_len is {self._length:,}",
        )
        return True

    # -- in vLLM's place ---------------------------------------------------------------------------------------------

    def _rotate(self, module: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Leave the rotation to the attention that follows."""

        def rotate(positions: Any, query: Any, key: Any = None, *args: Any, **kwargs: Any) -> Any:
            rows = query.shape[0]
            simple = key is not None and not args and not kwargs and positions.shape == (rows,)
            if self._waiting is not None or not simple or id(module) in self._kept or not decodes(rows):
                self._waiting = None
                return forward(positions, query, key, *args, **kwargs)
            self._waiting = _Turn(module, forward, positions, query, key)
            return query, key

        return rotate

    def _attend(self, name: str, layer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        from vllm.model_executor.layers.attention.attention import get_attention_context

        heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_size

        def attend(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            turn, self._waiting = self._waiting, None
            if turn is not None and not turn.is_of(query, key):
                self._kept.add(id(turn.module))
                unexpected(name, "queries that were changed after their rotary embedding")
                turn = None
            rows = query.shape[0]
            simple = not args and not kwargs and key is not None and value is not None and decodes(rows)
            context = get_attention_context(layer.layer_name) if simple else None
            if context is None or not _plain(context[0], rows) or self._is_long(rows * kv_heads):
                if turn is not None:
                    query, key = turn.now()
                return forward(query, key, value, *args, **kwargs)
            self._seen.setdefault(rows, set()).add(name)
            metadata, _, cache, slots = context
            key_cache, value_cache = cache.transpose(1, 2).split(dim, dim=-1)
            window = metadata.sliding_window or layer.impl.sliding_window
            out = paged_decode(
                query.view(rows, heads, dim),
                key.view(rows, kv_heads, dim),
                value.view(rows, kv_heads, dim),
                key_cache,
                value_cache,
                metadata.block_table[:rows],
                metadata.seq_lens[:rows],
                slots[:rows],
                scale=layer.impl.scale,
                rotation=turn.rotation(query) if turn is not None else None,
                window=window[0] + 1 if window[0] >= 0 else None,
                softcap=float(layer.impl.logits_soft_cap or 0.0),
                length=self._length,
            )
            return out.view(rows, heads * dim)

        return attend


class _Turn:
    """A rotation that was left to the attention layer after it."""

    def __init__(self, module: Any, forward: Callable[..., Any], positions: Any, query: Any, key: Any) -> None:
        self.module = module
        self._forward = forward
        self._given = (positions, query, key)

    def is_of(self, query: Any, key: Any) -> bool:
        """Whether these are the queries and keys that were handed on, as they were."""
        _, *given = self._given
        pairs = zip(given, (query, key), strict=True)
        return all(a.data_ptr() == b.data_ptr() and a.numel() == b.numel() for a, b in pairs if b is not None)

    def now(self) -> Any:
        """Rotate as vLLM does, after all."""
        return self._forward(*self._given)

    def rotation(self, query: Any) -> Rotation:
        """What the kernel rotates by."""
        table = self.module._match_cos_sin_cache_dtype(query)
        return Rotation(table, self._given[0], interleaved=not self.module.is_neox_style)


def _plain(metadata: Any, rows: int) -> bool:
    """Whether a layer's metadata asks for causal attention over a paged cache, and nothing else."""
    others = ("mm_prefix_range_tensor", "rswa_prefix_lens")
    return (
        not metadata.use_cascade
        and metadata.causal is True
        and all(getattr(metadata, name, None) is None for name in others)
        and metadata.seq_lens.shape[0] >= rows
        and metadata.block_table.shape[0] >= rows
    )
