"""Where the tokens of a forward pass lie, as each of its attention layers is told."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from trl_turbo.kernels.attention import Segments

#: The keyword in which a layout goes from a model's forward to its attention. A keyword reaches the layers in a
#: checkpoint's recompute too, reentrant or not: transformers binds it to the layer that is called again.
KEYWORD = "trl_turbo_layout"
#: The name under which `attn_implementation` selects our attention.
NAME = "trl_turbo"


@dataclass(frozen=True, eq=False)
class Onlookers:
    """P tokens of padding whose outputs a trainer reads: each sees all tokens of its row, and nothing sees them.

    Attributes:
        queries: int64 [B, M], which of the P each row has, filled up with any.
        back: int64 [P], where in [B * M] each of them is.
        keys: int64 [B, L], where in the packed row the tokens of each row are.
        seen: bool [B, L], where `keys` has one.
    """

    queries: torch.Tensor
    back: torch.Tensor
    keys: torch.Tensor
    seen: torch.Tensor


class Layout:
    """The sequences of one forward pass.

    No dataclass: where FSDP2 casts what its units are called with, it copies every dataclass among that, once for each
    layer (`torch.distributed.utils._apply_to_tensors`, torch 2.13). Layers would count themselves on their copies.

    Args:
        segments: The sequences, one after another, T tokens.
        onlookers: What stands behind them, P tokens, or `None`.
        index: int64 [T + P], where in the padded batch, as [B * L], each token of the packed row is; `None` where the
            model runs on the packed row itself.
        softcap: Whether the scores' softcap is applied. sdpa, whose place this may take, leaves it out.

    Attributes:
        calls: How many attention layers have used it.
    """

    def __init__(
        self,
        segments: Segments,
        onlookers: Onlookers | None = None,
        index: torch.Tensor | None = None,
        softcap: bool = True,
    ) -> None:
        self.segments = segments
        self.onlookers = onlookers
        self.index = index
        self.softcap = softcap
        self.calls = 0
        self._views: dict[int, tuple[Any, Any]] = {}

    def view(self, config: Any) -> Any:
        """A model's configuration as its attention is to see it: with our attention selected, and nothing else new."""
        found = self._views.get(id(config))
        if found is None:
            view = copy.copy(config)
            vars(view)["_attn_implementation_internal"] = NAME
            found = self._views[id(config)] = (config, view)  # the first of the two keeps the id from being used again
        return found[1]


def no_mask(device: torch.device) -> torch.Tensor:
    """What a model is given for a mask beside a layout.

    It has four dimensions, so transformers takes it as ready and makes none of [L, L]; and it is empty, so an attention
    that is not ours cannot add it to its scores and raises.
    """
    return torch.empty(1, 1, 0, 0, device=device)
