"""The plugins: built-in modules and entry points, each alone, so that one that is broken stops no other."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import pluggy

from trl_turbo import hookspecs
from trl_turbo._features import RESERVED
from trl_turbo.hookspecs import PROJECT, Env
from trl_turbo.patching import Patch
from trl_turbo.report import Row, Status

#: Returns ``(name, target, load)`` for each plugin of third parties.
EntryPoints = Callable[[], Iterable[tuple[str, str, Callable[[], Any]]]]


def describe(error: BaseException) -> str:
    """Return an exception in words."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def installed_entry_points() -> list[tuple[str, str, Callable[[], Any]]]:
    """Return the entry points of the group ``trl_turbo``, each once."""
    from importlib import metadata

    # A distribution that is on sys.path twice (an editable install and a wheel) is listed twice.
    found = {(point.name, point.value): point.load for point in metadata.entry_points(group=PROJECT)}
    return [(name, value, load) for (name, value), load in found.items()]


class Plugins:
    """The plugins of one session.

    Attributes:
        failures: A row for each plugin that could not be used.
        complete: Whether every plugin that is installed was loaded, so that all features are known.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._lock = threading.Lock()  # imports that end in several threads may report at once
        self._names: list[str] = []
        self.failures: list[Row] = []
        self.complete = True

    def add_builtin(self, modules: Iterable[str]) -> None:
        """Import and register the built-in plugin modules."""
        for module in modules:
            self._load(module.rpartition(".")[2], module, lambda module=module: importlib.import_module(module))  # type: ignore[misc]

    def add_entry_points(self, entry_points: EntryPoints) -> None:
        """Load and register third-party plugins."""
        try:
            points = list(entry_points())
        except Exception as error:
            # The metadata of any installed distribution may be unreadable.
            self._fail("entry_points", PROJECT, f"the entry points could not be listed ({describe(error)})")
            return
        for name, target, load in points:
            self._load(name, target, load)

    def add(self, name: str, plugin: Any) -> None:
        """Register a plugin object."""
        self._load(name, name, lambda: plugin)

    def patches(self, env: Env) -> list[tuple[Patch, str]]:
        """Ask every plugin for its patches.

        Returns:
            Each patch with the name of the plugin that brought it; a second one of the same name is left out, and its
            plugin has a row in ``failures``.
        """
        found: dict[str, tuple[Patch, str]] = {}
        for name in tuple(self._names):
            plugin = self._manager.get_plugin(name)
            others = {other for _, other in self._manager.list_name_plugin() if other is not plugin}
            try:
                answers = self._manager.subset_hook_caller("turbo_patches", others)(env=env)
                patches = [patch for answer in answers for patch in answer]
            except Exception as error:
                self._fail(name, name, f"its turbo_patches raised {describe(error)}")
                continue
            for patch in patches:
                problem = _problem(patch)
                if problem is None and patch.name in found:
                    problem = f"brought a second patch {patch.name!r}; {found[patch.name][1]} brings it already"
                if problem is not None:
                    self._fail(name, name, problem)
                else:
                    found[patch.name] = (patch, name)
        return list(found.values())

    def has(self, hook: str) -> bool:
        """Whether any plugin implements a hook."""
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call a hook. A plugin that raises has a row in ``failures``, is not asked again, and the rest answers."""
        while True:
            caller = getattr(self._manager.hook, hook)
            try:
                return caller(**arguments)
            except Exception as error:
                reason = f"its {hook} raised {describe(error)}"
                culprit = _culprit(caller.get_hookimpls(), error.__traceback__)
                if culprit is None:
                    self._fail(hook, hook, reason)
                    return None
                with self._lock:
                    if self._manager.get_plugin(culprit.plugin_name) is not None:
                        self._fail(culprit.plugin_name, culprit.plugin_name, reason)
                        self._manager.unregister(name=culprit.plugin_name)
                        self._names.remove(culprit.plugin_name)

    def _load(self, name: str, target: str, load: Callable[[], Any]) -> None:
        try:
            plugin = load()
        except Exception as error:
            self._fail(name, target, f"it could not be loaded ({describe(error)})")
            return
        try:
            self._manager.register(plugin, name)
            self._check_hooks(plugin)
        except Exception as error:
            # A registration that fails half way leaves the hooks that came before.
            if self._manager.get_plugin(name) is plugin:
                self._manager.unregister(plugin, name)
            self._fail(name, target, f"its hooks do not fit ({describe(error)})")
            return
        self._names.append(name)

    def _check_hooks(self, plugin: Any) -> None:
        for caller in self._manager.get_hookcallers(plugin) or ():
            optional = all(impl.optionalhook for impl in caller.get_hookimpls() if impl.plugin is plugin)
            if not caller.has_spec() and not optional:
                known = ", ".join(name for name in sorted(vars(hookspecs)) if name.startswith("turbo_"))
                raise ValueError(f"{caller.name!r} is not a hook; the hooks are {known}")

    def _fail(self, name: str, target: str, reason: str) -> None:
        self.complete = False
        earlier = next((row for row in self.failures if row.source == name), None)
        if earlier is not None:
            self.failures.remove(earlier)
            reason, target = f"{earlier.reason}; {reason}", earlier.target
        self.failures.append(Row(f"plugin.{name}", "plugins", Status.FAILED, reason, target, "a plugin", name))


def _problem(patch: Any) -> str | None:
    if not isinstance(patch, Patch):
        return f"its turbo_patches returned {patch!r}; return trl_turbo.patching.Patch objects"
    if not patch.feature.isidentifier() or patch.feature != patch.feature.lower() or patch.feature in RESERVED:
        return f"the feature {patch.feature!r} of its patch {patch.name!r} cannot be a keyword; use a lower-case name"
    return None


def _culprit(impls: Sequence[Any], traceback: TracebackType | None) -> Any:
    by_code = {getattr(impl.function, "__code__", None): impl for impl in impls}
    by_code.pop(None, None)
    while traceback is not None:
        if (impl := by_code.get(traceback.tb_frame.f_code)) is not None:
            return impl
        traceback = traceback.tb_next
    return None
