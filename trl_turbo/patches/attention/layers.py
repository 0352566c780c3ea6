"""The attention layers of a model, found by their calling transformers' attention interface, and told of a layout."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from trl_turbo.patches.attention.layout import KEYWORD, Layout
from trl_turbo.patching import Replacement, extend

INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def attention_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose own code asks the interface which attention to call."""
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and INTERFACE in code.co_names and hasattr(vars(module).get("config"), "__dict__"):
            yield module


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
