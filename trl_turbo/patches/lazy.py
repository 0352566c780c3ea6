"""Probes and builds that are imported when they are called: they import torch, TRL or vLLM, and `patch()` must not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any


def late(package: str, part: str, function: str, *args: Any) -> Callable[[ModuleType], Any]:
    """A function of a module of `package`, as a probe or a build.

    Args:
        package: Dotted name of the plugin package.
        part: Name of its module.
        function: Name of the function, which takes the patched module first.
        args: What it takes after that.
    """

    def call(module: ModuleType) -> Any:
        return getattr(importlib.import_module(f"{package}.{part}"), function)(module, *args)

    return call
