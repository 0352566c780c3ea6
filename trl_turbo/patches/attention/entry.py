"""Where the two features that run on a layout come in: transformers' tables, and the forward that scores.

Nothing but a call imports what imports that forward: it is patched from here while it is imported, by whatever comes to
it first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trl_turbo.patching import Replacement

if TYPE_CHECKING:
    from trl_turbo.patches.attention.passes import Arranged


def probe(module: ModuleType, feature: str | None = None) -> str | None:
    """Why the module does not fit, or `None`."""
    if feature is not None:
        return None
    if not hasattr(getattr(module, "AttentionInterface", None), "register"):
        return f"{module.__name__} has no AttentionInterface to register an attention with"
    from transformers import masking_utils

    if "sdpa" not in getattr(getattr(masking_utils, "AttentionMaskInterface", None), "_global_mapping", {}):
        return "transformers.masking_utils has no AttentionMaskInterface with a mask for sdpa"
    return None


def build(module: ModuleType, feature: str | None = None) -> Iterator[Replacement]:
    """The name in transformers' tables, which are no attributes; or the feature's way to arrange a pass.

    The latter is applied while accelerate is imported, which transformers imports: a model's first pass registers then.
    """
    if feature is None:
        from trl_turbo.patches.attention.interface import register

        register()
    else:
        yield Replacement(module, "arrange", functools.partial(_first, feature))


def _first(feature: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """What is applied last comes first: packing, then attention on the padded batch, then neither."""

    @functools.wraps(original)
    def arrange(*args: Any) -> Arranged | None:
        from trl_turbo.patches.attention import passes

        return passes.arrange(feature, *args) or original(*args)

    return arrange
