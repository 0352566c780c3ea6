"""What ``patch()`` intends, worked out before anything is changed and without any lock, since it runs plugins."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl_turbo._features import Switch, Switches
from trl_turbo.compat import versions
from trl_turbo.patching import Patch

if TYPE_CHECKING:
    from trl_turbo._plugins import EntryPoints, Plugins

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Sources:
    """Where plugins come from.

    Attributes:
        builtin: Plugin modules of the package itself.
        features: Built-in features, known whether or not their plugin can be imported.
        entry_points: Lists those of third parties; ``None`` for the installed ones.
        extra: Further plugin objects by name.
    """

    builtin: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    entry_points: EntryPoints | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Intent:
    """A patch, and why it is not to be applied."""

    patch: Patch
    source: str
    off: str = ""
    skip: str = ""
    fail: str = ""


@dataclass(frozen=True)
class Plan:
    """All that one call of ``patch()`` intends.

    Attributes:
        asked: What it was made from: equal for two calls that ask for the same.
        features: Every feature there is.
        versions: What is installed.
        intents: The patches, in the order in which they apply.
        kernels: ``trl_turbo.kernels`` where a plugin brings kernels, else ``None``.
        overrides: Those kernels: ``(op, device, dtype, function)``.
        warnings: Sentences to note in the report.
        plugins: The plugins, for the hooks that are called later.
    """

    asked: Asked
    features: frozenset[str]
    versions: dict[str, str | None]
    intents: tuple[Intent, ...]
    kernels: Any
    overrides: tuple[tuple[str, str, str, Callable[..., Any]], ...]
    warnings: tuple[str, ...]
    plugins: Plugins


@dataclass(frozen=True)
class Asked:
    """What the switches come to."""

    third_party: bool
    switches: tuple[tuple[str, Switch], ...]
    settings: tuple[tuple[str, str], ...] = ()


def ask(switches: Switches, features: Iterable[str]) -> Asked:
    """Resolve the switches of these features, and the settings."""
    third_party = switches.plugins and switches.everything
    resolved = tuple(sorted(switches.resolve(features).items()))
    return Asked(third_party, resolved, tuple(switches.settings.items()))


def make(sources: Sources, switches: Switches) -> Plan:
    """Load the plugins, collect their patches and decide what needs no import to be decided.

    Raises:
        TypeError: A keyword names no feature.
        ValueError: A switch in the environment is neither on nor off.
    """
    # Bad switches of built-in features raise before any plugin is loaded.
    switches.resolve(sources.features)
    plugins = _load(sources, switches)
    found = {**_own_version(), **versions.reported()}
    early = {**dict.fromkeys(sources.features, True), **switches.keywords}
    collected = plugins.patches(_env(found, switches.resolve(early)))

    features = frozenset(sources.features) | {patch.feature for patch, _ in collected}
    unknown = switches.unknown(features)
    third_party = switches.plugins and switches.everything
    warnings = list(switches.misspelt(features))
    if unknown is not None:
        # It may be the feature of a plugin that is switched off or broken, which must not break the script as well.
        if third_party and plugins.complete:
            raise TypeError(unknown)
        warnings.append(f"{unknown}, as far as plugins were loaded")

    asked = ask(switches, features)
    state = dict(asked.switches)
    env = _env(found, state)
    intents = tuple(_intend(patch, source, state[patch.feature], env, plugins) for patch, source in collected)
    kernels: Any = None
    overrides: tuple[tuple[str, str, str, Callable[..., Any]], ...] = ()
    if plugins.has("turbo_kernel") and any(switch.on for switch in state.values()):
        kernels = importlib.import_module("trl_turbo.kernels")
        overrides = tuple(_overrides(plugins, kernels.OPS))
    return Plan(asked, features, found, intents, kernels, overrides, tuple(warnings), plugins)


def _load(sources: Sources, switches: Switches) -> Plugins:
    from trl_turbo._plugins import Plugins, installed_entry_points

    plugins = Plugins()
    plugins.add_builtin(sources.builtin)
    for name, plugin in sources.extra.items():
        plugins.add(name, plugin)
    if switches.plugins and switches.everything:
        plugins.add_entry_points(sources.entry_points or installed_entry_points)
    return plugins


def _own_version() -> dict[str, str | None]:
    from trl_turbo import __version__

    return {"trl_turbo": __version__, "python": ".".join(map(str, sys.version_info[:3]))}


def _env(found: Mapping[str, str | None], switches: Mapping[str, Switch]) -> Any:
    from trl_turbo.hookspecs import Env

    on = {name: switch.on for name, switch in switches.items()}
    words = {name: switch.word for name, switch in switches.items() if switch.word}
    return Env(dict(found), str(found["python"]), sys.platform, on, words)


def _intend(patch: Patch, source: str, switch: Switch, env: Any, plugins: Plugins) -> Intent:
    if not switch.on:
        return Intent(patch, source, off=switch.reason)
    try:
        unmet = versions.unmet(patch.requires, env.versions)
    except ValueError as error:
        return Intent(patch, source, fail=str(error))
    if unmet is not None:
        return Intent(patch, source, skip=unmet)
    veto = plugins.call("turbo_veto", patch=patch, env=env)
    return Intent(patch, source, skip=str(veto) if veto is not None else "")


def _overrides(plugins: Plugins, ops: Iterable[str]) -> Iterable[tuple[str, str, str, Callable[..., Any]]]:
    for op, device, dtype in itertools.product(ops, DEVICES, DTYPES):
        function = plugins.call("turbo_kernel", op=op, device=device, dtype=dtype)
        if function is not None:
            yield op, device, dtype, function


def switches_of(keywords: Mapping[str, Any]) -> Switches:
    """Read the keywords and the environment of this moment."""
    return Switches(keywords, os.environ)
