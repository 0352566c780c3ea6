"""A group that does not divide the batch: TRL raises and says that it does not; the report says which sizes would."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.patches.people.warn import warn
from trl_turbo.patching import Replacement


def _config(module: ModuleType, name: str) -> Any:
    return getattr(module, f"{name.upper()}Config", None)


def probe(module: ModuleType, name: str) -> str | None:
    """Why the module does not fit, or `None`."""
    config = _config(module, name)
    if config is None or "__post_init__" not in vars(config):
        return f"{module.__name__} has no {name.upper()}Config with a __post_init__"
    return None


def build(module: ModuleType, name: str) -> Iterator[Replacement]:
    """The replacements."""
    yield Replacement(_config(module, name), "__post_init__", _told)


def _told(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except ValueError:
            text = remedy(self)
            if text is not None:
                warn("group_size", text)
            raise

    return post_init


def remedy(config: Any) -> str | None:
    """Say which sizes fit, or return `None` where they do."""
    group, batch = config.num_generations, config.generation_batch_size
    if not isinstance(group, int) or not isinstance(batch, int) or group < 1 or batch % group == 0:
        return None
    each = config.per_device_train_batch_size
    divisors = [size for size in range(2, batch + 1) if batch % size == 0]
    near = sorted(sorted(divisors, key=lambda size: abs(size - group))[:2])
    fits = next(size for size in range(each, each + group + 1) if (batch // each) * size % group == 0)
    return (
        f"num_generations={group} does not divide the {batch} completions that are sampled together: set "
        f"num_generations={' or '.join(map(str, near))}, or per_device_train_batch_size={fits}"
    )
