"""Probes and builds that are imported when they are called: they import torch, TRL or vLLM, and `patch()` must not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from trl_turbo.patching import Patch


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


def late_patch(
    package: str, feature: str, requires: str, name: str, module: str, part: str, summary: str, *args: Any
) -> Patch:
    """A patch whose probe and build are `probe` and `build` of a module of `package`.

    Args:
        package: Dotted name of the plugin package.
        feature: The feature's name, which the patch's name begins with.
        requires: The range that the patch is for, as in PEP 508.
        name: Its name within the feature.
        module: Dotted name of the module that it patches.
        part: Name of the package's module.
        summary: What it does, in the words of the report.
        args: What `probe` and `build` take after the patched module.
    """
    return Patch(
        name=f"{feature}.{name}",
        feature=feature,
        module=module,
        requires=(requires,),
        probe=late(package, part, "probe", *args),
        build=late(package, part, "build", *args),
        summary=summary,
    )
