"""Patches, and the ledger that applies them and takes them back. Imports neither torch nor trl."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from trl_turbo._switch import Switchable
from trl_turbo._switch import as_written as as_written
from trl_turbo._switch import replacement_of as replacement_of


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"


#: Stands for "not in ``vars(owner)``": the attribute is inherited, and restoring deletes it.
ABSENT = _Absent()


class Idle(str):
    """What a probe returns where a patch fits and has nothing to do here, such as where there is no GPU: why, in words.

    The row is `off`, and `patch(strict=True)` does not raise.
    """

    __slots__ = ()


# Where an instance keeps the entries of its own attributes.
_ENTRIES = "_trl_turbo_entries"


def _fits(_module: ModuleType) -> str | None:
    return None


@dataclass(frozen=True)
class Replacement:
    """One attribute to replace.

    Attributes:
        owner: The class or module that has it. For a method, the class to change in place. An instance is taken too,
            and is not kept alive.
        attr: Its name.
        wrap: Receives the raw original (``vars(owner).get(attr)``, or the inherited one, so a ``staticmethod`` object
            for a static method) and returns the new value, of the same kind or a bare function. It must be free of
            side effects: it may be called more than once, and its result dropped.
    """

    owner: Any
    attr: str
    wrap: Callable[[Any], Any]

    @property
    def label(self) -> str:
        """``Class.attr`` or ``module.attr``, as shown to a user."""
        named = self.owner if isinstance(self.owner, (type, ModuleType)) else type(self.owner)
        return f"{getattr(named, '__qualname__', named.__name__)}.{self.attr}"


@dataclass(frozen=True)
class Patch:
    """What to change in one module, and when it may be changed.

    Attributes:
        name: Unique name, such as ``"logprob.grpo"``.
        feature: Keyword of ``patch()`` and, in capitals, of the switch ``TRL_TURBO_<FEATURE>``.
        module: Dotted name of the module to patch: at once where it is imported, else when it is.
        summary: What it does, in one line.
        build: Receives the module and returns the replacements, which are applied as one unit: where one raises, all
            are taken back and the row is ``failed``. Free of side effects, like ``wrap``.
        requires: PEP 508 requirements that must all hold, such as ``("trl>=0.29.1,<1.15",)``.
        probe: Receives the module; returns ``None`` where the patch fits, else why not, in a sentence. It decides. An
            :class:`Idle` says that there is nothing to do on this machine.
    """

    name: str
    feature: str
    module: str
    summary: str
    build: Callable[[ModuleType], Iterable[Replacement]] = field(repr=False)
    requires: tuple[str, ...] = ()
    probe: Callable[[ModuleType], str | None] = field(default=_fits, repr=False)


@dataclass(eq=False)
class _Entry:
    patch: str
    replacement: Replacement
    saved: Any  # what stood in vars(owner), or ABSENT
    original: Any  # the raw value that wrap received
    installed: Any
    switch: Switchable | None
    live: bool = True

    def current(self) -> Any:
        return vars(self.replacement.owner).get(self.replacement.attr, ABSENT)

    def is_at(self, owner: Any, attr: str) -> bool:
        return self.replacement.owner is owner and self.replacement.attr == attr


@dataclass(eq=False)
class _Prepared:
    entry: _Entry
    new: Any
    before: Any  # vars(owner).get(attr) when it was prepared
    fresh: bool


class Ledger:
    """Applies replacements and takes them back; the only place that sets an attribute of somebody else's object.

    A function, method or property is replaced by a switchable wrapper. Where somebody else has wrapped it since, it
    cannot be taken out without dropping theirs: it becomes a pass-through to the original, stays in the ledger and is
    reported as blocked. The same patch applied again turns it on instead of wrapping twice.

    Args:
        lock: Held while attributes are set, never while ``build`` or ``wrap`` run: those may import, and an import lock
            taken under this lock would deadlock with an import whose end applies a patch.
    """

    def __init__(self, lock: AbstractContextManager[Any] | None = None) -> None:
        self._lock = lock if lock is not None else threading.RLock()
        self._kept: list[Callable[[], _Entry | None]] = []

    def apply(
        self, patch: Patch, module: ModuleType, *, wanted: Callable[[], bool] = lambda: True
    ) -> tuple[str, ...] | None:
        """Apply a patch as one unit.

        Args:
            patch: The patch.
            module: Its module, imported.
            wanted: Asked under the lock, when all is built: whether to install it still.

        Returns:
            The label of each replaced attribute, or ``None`` where it was no longer wanted.

        Raises:
            Exception: What ``build``, ``wrap`` or setting an attribute raised; nothing of the patch is left in place.
        """
        return self.replace(patch.name, patch.build(module), wanted=wanted)

    def replace(
        self, name: str, replacements: Iterable[Replacement], *, wanted: Callable[[], bool] = lambda: True
    ) -> tuple[str, ...] | None:
        """Apply replacements as one unit under the name of a patch; see :meth:`apply`."""
        replacements = tuple(replacements)
        self._validate(name, replacements)
        while True:
            prepared = [self._prepare(name, replacement) for replacement in replacements]
            with self._lock:
                if not wanted():
                    return None
                if all(self._still_holds(item) for item in prepared):
                    self._install(prepared)
                    return tuple(replacement.label for replacement in replacements)
            # Another thread changed one of the attributes since: wrap what stands there now.

    def stands(self, name: str, replacement: Replacement) -> bool:
        """Whether the patch has replaced this attribute, and its value is still there."""
        with self._lock:
            return any(
                entry.live and entry.patch == name and entry.current() is entry.installed
                for entry in self._entries()
                if entry.is_at(replacement.owner, replacement.attr)
            )

    def restore(self, names: Iterable[str] | None = None) -> None:
        """Take back the patches called ``names`` (all by default), newest first, and whatever was left over before."""
        with self._lock:
            chosen = None if names is None else set(names)
            for entry in reversed(self._entries()):
                if entry.live and (chosen is None or entry.patch in chosen):
                    self._turn_off(entry)
                if not entry.live and entry.current() is entry.installed:
                    self._put_back(entry)
                    self._drop(entry)

    def blocked(self) -> dict[str, tuple[str, ...]]:
        """Return, for each patch that could not be taken out, the labels where somebody else's value stands."""
        with self._lock:
            found: dict[str, tuple[str, ...]] = {}
            entries = self._entries()
            for index, entry in enumerate(entries):
                replacement = entry.replacement
                above = [e for e in entries[index + 1 :] if e.live and e.is_at(replacement.owner, replacement.attr)]
                # Below one of our own it passes through and goes with that one; a plain value cannot pass through.
                if entry.live or (above and entry.switch is not None):
                    continue
                found[entry.patch] = (*found.get(entry.patch, ()), replacement.label)
            return found

    def forget_overwritten(self, module: ModuleType) -> None:
        """Drop entries on ``module`` whose value is gone because the module ran again (``importlib.reload``)."""
        with self._lock:
            for entry in self._entries():
                if entry.replacement.owner is module and entry.current() is not entry.installed:
                    self._turn_off(entry)
                    self._drop(entry)

    def _entries(self) -> list[_Entry]:
        found = [(kept, kept()) for kept in self._kept]
        self._kept = [kept for kept, entry in found if entry is not None]
        return [entry for _, entry in found if entry is not None]

    def _keep(self, entry: _Entry) -> None:
        owner = entry.replacement.owner
        if isinstance(owner, (type, ModuleType)):
            self._kept.append(lambda: entry)
        else:
            # What stood there is most often bound to the instance: the ledger would keep a whole model alive. Kept by
            # the instance itself, the entry goes with it.
            vars(owner).setdefault(_ENTRIES, []).append(entry)
            self._kept.append(weakref.ref(entry))

    def _drop(self, entry: _Entry) -> None:
        self._kept = [kept for kept in self._kept if kept() is not entry]
        owner = entry.replacement.owner
        if not isinstance(owner, (type, ModuleType)):
            vars(owner)[_ENTRIES].remove(entry)
            if not vars(owner)[_ENTRIES]:
                del vars(owner)[_ENTRIES]

    @staticmethod
    def _validate(name: str, replacements: tuple[Replacement, ...]) -> None:
        seen: set[tuple[int, str]] = set()
        for replacement in replacements:
            if not isinstance(replacement, Replacement):
                raise TypeError(f"{name} was built from {replacement!r}; build it from Replacement objects")
            if not hasattr(replacement.owner, "__dict__"):
                raise TypeError(
                    f"{name} names {replacement.owner!r} as owner of {replacement.attr!r}, which has no attributes to "
                    "set; name the class or the module"
                )
            key = (id(replacement.owner), replacement.attr)
            if key in seen:
                raise ValueError(f"{name} replaces {replacement.label} twice; combine the two")
            seen.add(key)

    def _prepare(self, name: str, replacement: Replacement) -> _Prepared:
        owner, attr = replacement.owner, replacement.attr
        before = vars(owner).get(attr, ABSENT)
        with self._lock:
            entry = next((e for e in self._entries() if e.patch == name and e.is_at(owner, attr)), None)
        if entry is not None and self._in_chain(entry, before):
            new = replacement.wrap(entry.original)
            if entry.switch is not None:
                entry.switch.check(new)
            return _Prepared(entry, new, before, fresh=False)
        original = before if before is not ABSENT else _inherited(replacement)
        new = replacement.wrap(original)
        switch = Switchable(original) if Switchable.fits(original) else None
        if switch is not None:
            switch.check(new)
        installed = new if switch is None else switch.installed
        return _Prepared(_Entry(name, replacement, before, original, installed, switch), new, before, fresh=True)

    @staticmethod
    def _in_chain(entry: _Entry, value: Any) -> bool:
        if value is entry.installed:
            return True
        # A replacement that nothing visible leads to any more would be on and never called: wrap afresh instead, which
        # is right in either case, since the old one passes through.
        return entry.switch is not None and entry.switch.reached_from(value, dict(vars(entry.replacement.owner)))

    def _still_holds(self, item: _Prepared) -> bool:
        return item.entry.current() is item.before and (item.fresh or item.entry in self._entries())

    def _install(self, prepared: list[_Prepared]) -> None:
        done: list[_Prepared] = []
        try:
            for item in prepared:
                entry = item.entry
                if item.fresh:
                    setattr(entry.replacement.owner, entry.replacement.attr, entry.installed)
                    self._keep(entry)
                done.append(item)
                entry.live = True
                if entry.switch is not None:
                    entry.switch.on(item.new)
        except BaseException:
            for item in reversed(done):
                self._turn_off(item.entry)
                if item.fresh:
                    self._put_back(item.entry)
                    self._drop(item.entry)
            raise

    @staticmethod
    def _turn_off(entry: _Entry) -> None:
        entry.live = False
        if entry.switch is not None:
            entry.switch.off()

    @staticmethod
    def _put_back(entry: _Entry) -> None:
        if entry.saved is ABSENT:
            delattr(entry.replacement.owner, entry.replacement.attr)
        else:
            setattr(entry.replacement.owner, entry.replacement.attr, entry.saved)


def _inherited(replacement: Replacement) -> Any:
    owner, attr = replacement.owner, replacement.attr
    if isinstance(owner, type):
        for scope in owner.__mro__[1:]:
            if attr in vars(scope):
                return vars(scope)[attr]
    elif hasattr(owner, attr):  # a module with a lazy __getattr__, or an instance
        return getattr(owner, attr)
    raise AttributeError(f"{replacement.label} does not exist; the patch was written for another version of it")


_extend: Callable[[str, Replacement], None] | None = None


def set_current(function: Callable[[str, Replacement], None] | None) -> None:
    """Say who serves :func:`extend`. Called by the session."""
    global _extend
    _extend = function


def extend(name: str, replacement: Replacement) -> None:
    """Add a replacement to a patch that is on, at run time; it is taken back when the patch is.

    For what is only known once a script runs, such as the class of its model; the owner may be an instance. Where the
    replacement stands already, nothing is built; while nothing is patched, nothing happens.

    Args:
        name: Name of the patch.
        replacement: What to replace.

    Raises:
        Exception: What ``wrap`` or setting the attribute raised; it is not left in place.
    """
    if _extend is not None:
        _extend(name, replacement)
