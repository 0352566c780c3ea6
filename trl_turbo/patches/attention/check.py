"""Whether a model may run on a layout: asked of its structure, then of its own forward on random tokens, once.

Three questions, all answered by numbers of the model at hand, in the dtype at hand:

- *Each attention.* On the model's own queries, keys and values ours is as close to the float64 answer as stock is,
  under the window that the stock mask itself leaves (`probe`).
- *The whole forward.* With a layout every token's hidden state is that of the stock forward of the padded batch. It may
  differ by what rounding does: four times what it moves by where every embedding moves by one unit in the last place,
  and 4 units in the last place itself (2^-12 in float32).
- *Nothing else between tokens.* That difference is under a quarter of what another prompt changes, so that what would
  pass from one sequence to the next (the state of a recurrent layer, a convolution) cannot hide behind rounding.

Where FSDP2 or ZeRO-3 shards a model, its modules are asked with other numbers in place of what is not whole
(`stand_in`): alone in each process, without a collective, and with the same verdict in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from trl_turbo.patches.attention.interface import UnsupportedAttentionError, register
from trl_turbo.patches.attention.layers import attention_layers, hook_kinds
from trl_turbo.patches.attention.layout import KEYWORD, NAME, Layout, no_mask
from trl_turbo.patches.attention.probe import Probe, probing
from trl_turbo.patches.attention.rows import Rows, find_rows
from trl_turbo.patches.attention.stand_in import has_shards, stand_in
from trl_turbo.patches.blocks.agreement import autocast_dtype, generator, judge
from trl_turbo.patches.logprob.forward import standing_in_for
from trl_turbo.patches.logprob.request import completion_targets

_PROMPT, _COMPLETION = 12, 10
# Left and right padding, a shared prompt, and lengths that no tile divides
_PROMPTS, _COMPLETIONS = (12, 12, 7), (10, 4, 7)


@dataclass(frozen=True, eq=False)
class Verdict:
    """What was found out about a model in one state.

    Attributes:
        kinds: The classes of its attention layers.
        layers: How many of them one forward calls.
        windowed: Whether any of them has a sliding window.
        softcap: Whether a softcap of the scores is applied: sdpa leaves it out, and so does ours in its place.
        ignored: The softcap that sdpa leaves out, or `None`.
        attention_dropout: The most that a layer drops out of its attention weights in training.
    """

    kinds: tuple[type, ...]
    layers: int
    windowed: bool
    softcap: bool
    ignored: float | None
    attention_dropout: float


_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], tuple[Verdict | None, str]]] = WeakKeyDictionary()


def verdict_of(
    model: nn.Module, original: Callable[..., Any], patch: str, packed: bool, device: torch.device
) -> tuple[Verdict | None, str]:
    """What is known about a model, found out where it is asked for the first time in this state.

    Args:
        model: A causal language model.
        original: Its forward, called with the model first.
        patch: Name of the patch that its attention layers are hooked for.
        packed: Whether it is to run on packed rows, not only with our attention on the padded batch.
        device: Where it computes.

    Returns:
        The verdict, or `None` and why it must be left alone.
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None:
        return None, "it has no floating-point parameter"
    autocast = autocast_dtype(device)
    config: Any = model.config
    state = (packed, config._attn_implementation, weight.dtype, device, autocast)
    known = _KNOWN.setdefault(model, {})
    if state not in known:
        reason = _unfit(model)
        if reason is None:
            known[state] = judge(lambda: _answer(model, original, patch, packed, device), device, autocast)
        else:
            known[state] = None, reason
    verdict, reason = known[state]
    if verdict is not None:  # after unpatch() and patch() the verdict stands, and neither hooks nor name do
        register()
        hook_kinds(patch, verdict.kinds)
    return verdict, reason


def drops_out(model: nn.Module) -> bool:
    """Whether activations of a model are dropped out now; adapters come and go."""
    # Each pass asks, and `model.modules()`, a generator in a generator for each level, takes five times as long
    seen, found = {model}, [model]
    for module in found:
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            return True
        for inner in module._modules.values():
            if inner is not None and inner not in seen:
                seen.add(inner)
                found.append(inner)
    return False


def _unfit(model: Any) -> str | None:
    """Why a model must be left alone for what it is, or `None`."""
    if getattr(model, "_is_replica", False):
        return "it is a replica of nn.DataParallel"
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            return "it is compiled by torch.compile"
        if type(module).__name__ == "FullyShardedDataParallel":
            return "its parameters are parts of flat ones, as FSDP in its first version makes them"
    layers = list(attention_layers(model))
    if not layers:
        return "none of its layers calls transformers' attention interface"
    for layer in layers:
        config: Any = layer.config
        name = config._attn_implementation
        if name not in ("eager", "sdpa", NAME):
            return f"attn_implementation={name!r} is the script's choice"
        if "forward" in vars(layer):
            return f"its {type(layer).__name__} has a forward of its own on the instance"
    kinds = {name for layer in layers for name in getattr(layer.config, "layer_types", None) or ()}
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    return f"its layers are of other kinds too ({', '.join(others)})" if others else None


def _answer(
    model: Any, original: Callable[..., Any], patch: str, packed: bool, device: torch.device
) -> tuple[Verdict | None, str]:
    try:
        if has_shards(model):
            model = stand_in(model, device)
            original = type(model).forward
        return _examine(model, original, patch, packed)
    except UnsupportedAttentionError as error:
        return None, str(error)


def _examine(model: Any, original: Callable[..., Any], patch: str, packed: bool) -> tuple[Verdict | None, str]:
    head = model.get_output_embeddings()
    if head is None:
        return None, "it has no output head"
    register()
    device, vocab = model.get_input_embeddings().weight.device, model.config.get_text_config().vocab_size
    numbers = generator()
    ids = torch.randint(vocab, (3, _PROMPT + _COMPLETION), generator=numbers)
    other = ids.clone()
    other[:, :_PROMPT] = torch.randint(vocab, (3, _PROMPT), generator=numbers)
    ids[1, :_PROMPT] = ids[0, :_PROMPT]
    column = torch.arange(ids.shape[1]).expand_as(ids)
    starts = _PROMPT - torch.tensor(_PROMPTS)[:, None]
    mask = ((column >= starts) & (column < _PROMPT + torch.tensor(_COMPLETIONS)[:, None])).long()
    ids, other, mask, column = (x.to(device) for x in (ids, other, mask, column))

    def run(ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        with standing_in_for(head, model.config):
            return original(model, input_ids=ids, use_cache=False, return_dict=True, **kwargs).logits.hidden

    targets = completion_targets(_COMPLETION)(ids, mask)
    padded = _rows(find_rows(ids, mask, targets, column, share=False, reach=False))
    stock = str(model.config._attn_implementation)
    with torch.no_grad(), _evaluating(model):
        probe = Probe(stock, Layout(padded.segments, None, padded.index, stock != "sdpa"))
        with probing(model, probe), _saying_what_they_drop(model):
            plain = run(ids, attention_mask=mask)
        # Under autocast hidden states may be in float32, and what they are made of is not
        eps = max(torch.finfo(dtype).eps for dtype in (plain.dtype, *probe.dtypes))
        with _nudged(model.get_input_embeddings(), eps):
            nudged = run(ids, attention_mask=mask)
        elsewhere = run(other, attention_mask=mask)
        hook_kinds(patch, (type(layer) for layer in attention_layers(model)))
        layout = Layout(padded.segments, None, padded.index, stock != "sdpa")
        keywords = {KEYWORD: layout, "attention_mask": no_mask(device)}
        index = padded.index
        try:
            if packed:
                rows = _rows(find_rows(ids, mask, targets, column, share=True, reach=False))
                layout.segments, layout.index, index = rows.segments, None, rows.index
                found = run(rows.pack(ids), position_ids=rows.pack(column), **keywords)[0]
            else:
                found = run(ids, **keywords).flatten(0, 1)[index]
        except (RuntimeError, TypeError, ValueError) as error:
            # The mask beside a layout fits nothing, so that an attention which is not told of the layout raises
            return None, f"a layout does not reach its attention layers ({type(error).__name__}: {error})"
    if not probe.layers or layout.calls != len(probe.layers):
        return None, f"a layout reached {layout.calls} of its {len(probe.layers)} attention layers"

    true = plain.flatten(0, 1)
    noise = _apart(nudged.flatten(0, 1)[padded.index], true[padded.index]).amax()
    effect = _apart(elsewhere.flatten(0, 1)[padded.index], true[padded.index]).median()
    off = _apart(found, true[index]).amax()
    if not (off <= 4 * noise + max(4 * eps, 2**-12) and off <= effect / 4):
        what = "on one packed row" if packed else "with our attention"
        return None, (
            f"{what} its hidden states are off by {off:.1e} where rounding makes {noise:.1e} and another prompt "
            f"{effect:.1e}: something else than its attention may pass between tokens"
        )
    return Verdict(
        kinds=tuple(dict.fromkeys(type(layer) for layer, _ in probe.layers)),
        layers=len(probe.layers),
        windowed=any(window is not None for _, window in probe.layers),
        softcap=stock != "sdpa",
        ignored=probe.softcap if stock == "sdpa" else None,
        attention_dropout=probe.dropout,
    ), ""


def _rows(found: Rows | str | None) -> Rows:
    if not isinstance(found, Rows):
        raise RuntimeError(f"the check's own batch has no rows: {found}")
    return found


@contextmanager
def _nudged(embeddings: nn.Module, eps: float) -> Iterator[None]:
    """Every embedding is moved by +-`eps` of itself."""

    def nudge(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator()) * 2 - 1
        return output * (1 + eps * signs.to(output))

    handle = embeddings.register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()


def _apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How far each row of [N, H] is from the other's, in units of the other."""
    one, other = one.double(), other.double()
    return (one - other).norm(dim=-1) / other.norm(dim=-1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Nothing is dropped out and no random number drawn; each module's own state comes back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _saying_what_they_drop(model: nn.Module) -> Iterator[None]:
    """Attention layers, and nothing in them, are in training, so that they hand on the dropout of their weights."""
    layers = list(attention_layers(model))
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
