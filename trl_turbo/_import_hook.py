"""Calls back when a module has been imported, without importing it."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Callback = Callable[[str, ModuleType], None]

# How long settle() waits for another thread that has found a module's spec and not yet put it into sys.modules, which
# takes microseconds.
_SETTLE_S = 0.05


class ImportHook:
    """A finder in front of ``sys.meta_path`` that calls back at the end of the import of the modules it watches.

    It finds nothing itself: it asks the other finders and wraps ``exec_module`` of the loader they name. This works
    with lazy modules, which import through the same machinery, and with ``importlib.reload``. It holds no lock.

    Args:
        callback: Called with the name and the module, in the importing thread, while that module's import lock is held.
            What it raises makes the import fail.
    """

    def __init__(self, callback: Callback) -> None:
        self._callback = callback
        self._names: frozenset[str] = frozenset()
        self._asking = threading.local()

    def watch(self, names: Iterable[str]) -> None:
        """Watch exactly these modules from now on. With none, leave ``sys.meta_path``."""
        self._names = frozenset(names)
        present = any(finder is self for finder in sys.meta_path)
        if self._names and not present:
            sys.meta_path.insert(0, self)
        elif not self._names and present:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that another finder has for a watched module, with its loader wrapped."""
        if fullname not in self._names:
            return None
        asking: set[str] = self._asking.__dict__.setdefault("names", set())
        if fullname in asking:  # another finder that asks all finders, as some instrumentation does
            return None
        asking.add(fullname)
        try:
            for finder in tuple(sys.meta_path):
                find_spec = getattr(finder, "find_spec", None)
                if finder is self or find_spec is None:
                    continue
                spec: ModuleSpec | None = find_spec(fullname, path, target)
                if spec is not None:
                    # Without exec_module it is a namespace package or a loader of old: nothing to wrap.
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader, self._callback)  # type: ignore[assignment]
                    return spec
            return None
        finally:
            asking.discard(fullname)


class _Loader:
    """Stands for another loader until the module runs; then the module has its own loader back."""

    def __init__(self, loader: Any, callback: Callback) -> None:
        self._loader = loader
        self._callback = callback

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        spec: Any = module.__spec__
        if spec is not None and spec.loader is self:
            spec.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        # A lazy package replaces itself in sys.modules while it runs.
        self._callback(name, sys.modules.get(name, module))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def loaded(name: str) -> ModuleType | None:
    """Return a module that is in ``sys.modules``, complete or still running."""
    return sys.modules.get(name)


def is_importing(module: ModuleType) -> bool:
    """Whether the module is still running its body."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def settle(name: str) -> ModuleType | None:
    """Return the loaded module, after a moment where another thread is just about to put it into ``sys.modules``.

    That thread may have asked the finders before the hook was among them, and would then run the module unseen.
    """
    module = loaded(name)
    locks: dict[str, Any] = getattr(importlib._bootstrap, "_module_locks", {})
    deadline = time.monotonic() + _SETTLE_S
    while module is None and name in locks and locks[name]() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
        module = loaded(name)
    return module


class _WatchedSpec(ModuleSpec):
    """The spec of a module that is running; the import system sets ``_initializing`` to false when it has ended."""

    _turbo_callbacks: list[Callback]

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__.get("_initializing", False))

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        if value:
            self.__dict__["_initializing"] = value
            return
        try:
            module = loaded(self.name)  # not there where the body raised
            for callback in self.__dict__.pop("_turbo_callbacks", ()) if module is not None else ():
                callback(self.name, module)
        finally:
            # Only now: other threads wait for the module while this is true, and see it patched.
            self.__dict__["_initializing"] = False
            self.__class__ = ModuleSpec  # type: ignore[assignment]


def call_when_imported(module: ModuleType, callback: Callback) -> bool:
    """Call back when a module that is running its body has ended, in the thread that imports it.

    No loader can be wrapped any more. Waiting for the import lock would be a deadlock where this very thread is inside
    that import (a package whose import runs an entry point that calls ``patch()``): the module's spec is made to tell.

    Returns:
        Whether the call will come; ``False`` where the import has ended meanwhile.
    """
    spec = module.__spec__
    if spec is None or not is_importing(module):
        return False
    if type(spec) is ModuleSpec:
        spec.__dict__["_turbo_callbacks"] = [callback]
        spec.__class__ = _WatchedSpec
    elif isinstance(spec, _WatchedSpec):
        callbacks = spec.__dict__.setdefault("_turbo_callbacks", [])
        if callback not in callbacks:
            callbacks.append(callback)
    return is_importing(module)
