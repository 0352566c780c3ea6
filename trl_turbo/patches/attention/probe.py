"""Watch what a model's attention is asked for and what masks it is given, in a run of its own code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.patches.attention.interface import UnsupportedAttentionError, over_layout, refuse
from trl_turbo.patches.attention.layout import Layout

NAME = "trl_turbo_probe"
#: How far back a mask is asked: farther than any window or chunk of a known model.
FARTHEST = 1 << 20


@dataclass(eq=False)
class Probe:
    """What was seen in one run.

    Attributes:
        stock: The attention implementation that the model has, `eager` or `sdpa`.
        layout: The sequences of the padded batch that it runs on.
        layers: The attention modules that were called, in order, and the window of each.
        softcap: The softcap that attention was handed last, or `None`.
        dtypes: In which dtypes attention answered.
        dropout: The most that any of them drops out of its weights in training.
    """

    stock: str
    layout: Layout
    softcap: float | None = None
    dropout: float = 0.0
    dtypes: set[torch.dtype] = field(default_factory=set)
    layers: list[tuple[nn.Module, int | None]] = field(default_factory=list)
    _masks: list[tuple[torch.Tensor, int | None]] = field(default_factory=list)

    def mask(self, mask_function: Callable[..., Any], **kwargs: Any) -> Any:
        """The stock mask, remembered with the window that its function leaves."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        window = window_of(mask_function)
        # Where sdpa could do without, it would be told causal alone, and nothing to recognise the layer's window by
        kwargs["allow_is_causal_skip"] = False
        made = ALL_MASK_ATTENTION_FUNCTIONS[self.stock](mask_function=mask_function, **kwargs)
        self._masks.append((made, window))
        return made

    def attend(self, module: nn.Module, query: Any, key: Any, value: Any, mask: Any, kwargs: dict[str, Any]) -> Any:
        """The stock attention of one layer, next to ours.

        Raises:
            UnsupportedAttentionError: Ours computes something else, or rounds worse.
        """
        self.dropout = max(self.dropout, kwargs.get("dropout", 0.0))
        kwargs = {**kwargs, "dropout": 0.0}
        scale = kwargs.get("scaling")
        rest = {k: v for k, v in kwargs.items() if k not in ("dropout", "scaling")}
        refuse(module, query, key, value, 0.0, rest)
        window = self._window(mask)
        named = rest.get("sliding_window")
        if window != named:
            raise UnsupportedAttentionError(
                f"its mask leaves {_tokens(window)} to a token where its attention is told {_tokens(named)}"
            )
        stock = self._stock(module)
        answer = stock(module, query, key, value, mask, **kwargs)
        self.softcap = rest.get("softcap")
        softcap = self.softcap if self.layout.softcap else None
        ours = over_layout(query, key, value, self.layout, scale, window, softcap)
        with torch.autocast(query.device.type, enabled=False):
            exact = mask.double() if mask.is_floating_point() else mask
            truth = stock(module, query.double(), key.double(), value.double(), exact, **kwargs)[0]
        _agree(ours, answer[0], truth, self.layout.index)
        self.dtypes.add(answer[0].dtype)
        self.layers.append((module, window))
        return answer

    def _window(self, mask: Any) -> int | None:
        for made, window in self._masks:
            if made is mask or (isinstance(mask, torch.Tensor) and made.data_ptr() == mask.data_ptr()):
                return window
        whose = "no mask" if mask is None else "a mask that the model makes by itself"
        raise UnsupportedAttentionError(f"its attention is given {whose}")

    def _stock(self, module: nn.Module) -> Callable[..., Any]:
        if self.stock == "eager":
            return sys.modules[type(module).__module__].eager_attention_forward
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS[self.stock]


_PROBE: ContextVar[Probe | None] = ContextVar("trl_turbo_probe", default=None)


@contextmanager
def probing(model: nn.Module, probe: Probe) -> Iterator[Probe]:
    """Within this scope the model's attention and masks go through `probe`."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    configs = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}
    before = [(c, vars(c).get("_attn_implementation_internal")) for c in configs.values()]
    token = _PROBE.set(probe)
    try:
        for config, name in before:
            if name == probe.stock:
                vars(config)["_attn_implementation_internal"] = NAME
        yield probe
    finally:
        for config, name in before:
            if name == probe.stock:
                vars(config)["_attn_implementation_internal"] = name
        _PROBE.reset(token)
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)


def window_of(mask_function: Callable[..., Any]) -> int | None:
    """How many tokens, itself included, a token sees by transformers' mask function; `None` for all before it.

    Raises:
        UnsupportedAttentionError: It is neither causal nor a window of what is.
    """
    zero, windows = torch.tensor(0), []
    for at in (FARTHEST, FARTHEST // 3):
        try:
            seen = mask_function(zero, zero, torch.tensor(at), torch.arange(at, -1, -1))
            ahead = mask_function(zero, zero, torch.tensor(at), torch.arange(at + 1, at + 65))
            seen, ahead = seen.expand(at + 1), ahead.expand(64)
        except (IndexError, RuntimeError) as error:
            raise UnsupportedAttentionError("its mask depends on more than how far apart two tokens are") from error
        count = int(seen.sum())
        if ahead.any() or not seen[:count].all():
            raise UnsupportedAttentionError("its mask is neither causal nor a sliding window")
        windows.append(None if count == at + 1 else count)
    if windows[0] != windows[1] and not (windows[1] is None and (windows[0] or 0) > FARTHEST // 3):
        raise UnsupportedAttentionError("its mask is neither causal nor a sliding window, as of attention in chunks")
    return windows[0]


def _agree(ours: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor, index: torch.Tensor | None) -> None:
    """Both in the dtype at hand, by their distance from the float64 answer; a row [H * D] a token."""
    if ours.shape != stock.shape or ours.dtype != stock.dtype:
        raise UnsupportedAttentionError(
            f"its attention answers {list(stock.shape)} in {stock.dtype} where ours gives {list(ours.shape)} in "
            f"{ours.dtype}"
        )
    rows = [x.flatten(0, 1).flatten(1) for x in (ours, stock, truth)]
    if index is not None:
        rows = [x.index_select(0, index) for x in rows]
    mine, theirs, true = rows
    # Stock rounds its weights to the dtype at hand and ours does not have to: one more rounding of every weight
    if not excess_error(mine, theirs, true, 1.0) <= 1:
        raise UnsupportedAttentionError("its attention computes something else than ours")


def _attention(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    probe = _PROBE.get()
    if probe is None:
        raise RuntimeError(f"the attention {NAME!r} was called outside of a check; report this as a bug of trl_turbo.")
    return probe.attend(module, query, key, value, attention_mask, kwargs)


def _mask(*args: Any, mask_function: Callable[..., Any], **kwargs: Any) -> Any:
    probe = _PROBE.get()
    if probe is None or args:
        raise RuntimeError(f"the mask {NAME!r} was made outside of a check; report this as a bug of trl_turbo.")
    return probe.mask(mask_function, **kwargs)


def _tokens(window: int | None) -> str:
    return "all tokens" if window is None else f"{window} tokens"
