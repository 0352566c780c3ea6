"""One scoring pass on a layout: what the model is called with instead, and how its answers go back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trl_turbo.patches.attention.check import drops_out, verdict_of
from trl_turbo.patches.attention.interface import equal_segments
from trl_turbo.patches.attention.layout import KEYWORD, Layout, no_mask
from trl_turbo.patches.attention.rows import Rows, find_rows
from trl_turbo.report import note

#: A batch without padding is packed where at least this share of it is a prompt that is there already. Attention over
#: sequences takes some 4/3 of the time of a dense one (H200, bf16), and attention is a tenth to a quarter of a layer at
#: the lengths of a rollout: below this share packing could lose.
WORTH = 0.05

# What a scoring pass is called with beside ids, mask and positions, and what means nothing for a layout
_IDLE = frozenset({"use_cache", "return_dict", "output_hidden_states", "logits_to_keep", "num_logits_to_keep"})


@dataclass(frozen=True, eq=False)
class Arranged:
    """A pass on a layout.

    Attributes:
        kwargs: What the model is called with.
        targets: int64 [1, T] or [B, L]: the token that each position the model runs on is asked about.
        rows: How the packed row lies in the batch; `None` where the model runs on the padded batch.
        layout: What the attention layers are handed.
        layers: How many of them there are.
    """

    kwargs: dict[str, Any]
    targets: torch.Tensor
    rows: Rows | None
    layout: Layout
    layers: int

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values at the positions that the model ran on, back in [B, L]."""
        return values if self.rows is None else self.rows.spread(values)

    def ran(self) -> None:
        """Make sure that every attention layer of the forward that has just run used the layout.

        Raises:
            RuntimeError: One did not, so that its tokens saw what they must not see.
        """
        if self.layout.calls != self.layers:
            raise RuntimeError(
                f"a layout reached {self.layout.calls} of {self.layers} attention layers; call "
                "trl_turbo.patch(packing=False, attention=False) and report this as a bug of trl_turbo."
            )


def arrange(
    feature: str,
    model: nn.Module,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    targets: torch.Tensor,
) -> Arranged | None:
    """Put a pass on a layout, or note why not and return `None`.

    Args:
        feature: `packing`: the model runs on one packed row; `attention`: on the padded batch, our attention on the
            sequences in it.
        model: A causal language model.
        original: Its forward, called with the model first.
        args: What it is called with: the ids, or nothing.
        kwargs: The rest.
        targets: int64 [B, L], the token that each position is asked about, -100 for none.
    """
    if torch.compiler.is_compiling():
        return None
    found = _arrange(feature, model, original, args, kwargs, targets)
    if isinstance(found, str):
        consequence = "its passes keep their padding" if feature == "packing" else "its passes keep their attention"
        note(feature, f"{type(model).__name__}: {found}; {consequence}")
        return None
    return found


def _arrange(
    feature: str,
    model: nn.Module,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    targets: torch.Tensor,
) -> Arranged | str | None:
    given = dict(kwargs)
    if args:
        given["input_ids"] = args[0]
    ids, mask, positions = (given.pop(name, None) for name in ("input_ids", "attention_mask", "position_ids"))
    if len(args) > 1 or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or targets.shape != ids.shape:
        return "it is called with something else than ids [B, L], as prompt-learning adapters do"
    if given.pop("output_router_logits", False) or _counts_tokens(model):
        return "the load-balancing loss of its experts counts every token of the batch"
    for name, value in given.items():
        if value is not None and value is not False and name not in _IDLE:
            return f"it is called with `{name}`"
    if mask is not None and mask.dim() != 2:
        return "it is called with a mask of its own"
    if positions is not None and positions.dim() != 2:
        return "its positions have more than one coordinate"
    packed = feature == "packing"
    verdict, reason = verdict_of(model, original, f"{feature}.passes", packed, ids.device)
    if verdict is None:
        return reason
    if model.training and verdict.attention_dropout:
        return f"it drops out {verdict.attention_dropout:g} of its attention weights, which our attention cannot"
    # As transformers counts where it is given none: padding counts too
    at = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
    at, share = at.expand_as(ids), packed and _shares(model)
    rows = find_rows(ids, mask, targets.to(ids.device), at, share=share, reach=packed)
    if rows is None or isinstance(rows, str):
        return rows
    if verdict.windowed and rows.holes:
        return "padding lies between the tokens of a row, and the sliding window counts it"
    if verdict.windowed and rows.onlookers is not None:
        return "the trainer reads what the model says at padding, which its sliding window leaves behind"
    if verdict.ignored is not None:
        note(
            feature,
            f"{type(model).__name__}: attn_implementation='sdpa' leaves out its softcap of {verdict.ignored:g}, and so "
            "does ours in its place; 'eager' or 'trl_turbo' applies it",
        )
    dense = rows.full and (not packed or rows.saved < WORTH)
    if dense:
        layout = Layout(equal_segments(*ids.shape, ids.device), softcap=verdict.softcap)
    else:
        layout = Layout(rows.segments, rows.onlookers, None if packed else rows.index, verdict.softcap)
    given |= {KEYWORD: layout, "attention_mask": no_mask(ids.device), "use_cache": False}
    if packed and not dense:
        given |= {"input_ids": rows.pack(ids), "position_ids": rows.pack(at)}
        return Arranged(given, rows.pack(targets.to(ids.device)), rows, layout, verdict.layers)
    given |= {"input_ids": ids} if positions is None else {"input_ids": ids, "position_ids": positions}
    return Arranged(given, targets, None, layout, verdict.layers)


def runs_packed(model: nn.Module, device: torch.device) -> bool:
    """Whether the passes of a model go to packed rows on a device, as far as that does not depend on the batch."""
    if torch.compiler.is_compiling() or _counts_tokens(model):
        return False
    verdict, _ = verdict_of(model, type(model).forward, "packing.passes", True, device)
    return verdict is not None and not (model.training and verdict.attention_dropout)


def _counts_tokens(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def _shares(model: nn.Module) -> bool:
    if drops_out(model):
        note(
            "packing",
            f"{type(model).__name__}: activations are dropped out, for each answer anew in its prompt too; prompts are "
            "not shared in training",
        )
        return False
    return True
