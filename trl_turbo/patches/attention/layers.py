"""The attention layers of a model, found by their calling transformers' attention interface, and told of a layout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from trl_turbo.patches.attention.layout import KEYWORD, Layout
from trl_turbo.patching import Replacement, extend, replacement_of

INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def attention_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose own code asks the interface which attention to call."""
    for module in model.modules():
        if hasattr(vars(module).get("config"), "__dict__") and _asks_interface(type(module).forward):
            yield module


def _asks_interface(function: Any) -> bool:
    """Whether a forward, or what it wraps, names transformers' table of attentions."""
    for _ in range(16):  # a chain is a few wrappers long
        function = replacement_of(function) or function
        code = getattr(function, "__code__", None)
        if code is not None and INTERFACE in code.co_names:
            return True
        function = getattr(function, "__wrapped__", None)
        if function is None:
            return False
    return False


def hook_kinds(patch: str, kinds: Iterable[type]) -> None:
    """Let classes of attention layers call ours wherever they are handed a layout.

    Args:
        patch: Name of the patch that this belongs to.
        kinds: The classes.
    """
    for kind in dict.fromkeys(kinds):
        extend(patch, Replacement(kind, "forward", make_forward))


def make_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an attention class's forward: with a layout in its keywords its configuration names our attention.

    The choice goes with the call, and nothing else sees it: not generation, not a saved configuration, not another
    thread's replica of the module. Under gradient checkpointing the layer is called again, with the same keywords.
    """

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layout: Layout | None = kwargs.get(KEYWORD)
        if layout is None:
            return original(self, *args, **kwargs)
        own = vars(self)
        config = own["config"]
        own["config"] = layout.view(config)
        try:
            return original(self, *args, **kwargs)
        finally:
            own["config"] = config

    return forward
