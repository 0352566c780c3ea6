"""The state behind ``patch()``, ``unpatch()`` and ``status()``.

One lock guards it. It is never held while foreign code runs that may import (plugins, probes, builds): the end of an
import takes it while holding that module's import lock. What two threads build at once is installed once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from trl_turbo import _import_hook, _logs, _plan, patching, report, settings
from trl_turbo._features import Switches
from trl_turbo._plan import Intent, Plan, Sources
from trl_turbo.patching import Idle, Ledger, Patch, Replacement
from trl_turbo.report import NoteLog, PeakLog, Report, Row, Status

logger = _logs.get()

_PENDING = "applies when {} is imported"
_BLOCKED = "somebody else has wrapped {} since; ours passes calls through to the original until theirs is gone"


class PatchError(RuntimeError):
    """A patch was skipped or failed under ``strict=True``."""


@dataclass(eq=False)
class _State:
    """Where one patch stands."""

    patch: Patch
    source: str
    status: Status
    reason: str = ""
    settled: bool = False  # decided without its module: off, out of range or vetoed
    module: ModuleType | None = None  # the one it was last tried on

    @classmethod
    def of(cls, intent: Intent) -> _State:
        if intent.off:
            return cls(intent.patch, intent.source, Status.OFF, intent.off, settled=True)
        if intent.fail:
            return cls(intent.patch, intent.source, Status.FAILED, intent.fail, settled=True)
        if intent.skip:
            return cls(intent.patch, intent.source, Status.SKIPPED, intent.skip, settled=True)
        return cls(intent.patch, intent.source, Status.PENDING, _PENDING.format(intent.patch.module))

    @property
    def row(self) -> Row:
        patch = self.patch
        return Row(patch.name, patch.feature, self.status, self.reason, patch.module, patch.summary, self.source)


class Session:
    """Patches, and takes back.

    Args:
        sources: Where plugins come from.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._lock = threading.RLock()
        self._ledger = Ledger(self._lock)
        self._hook = _import_hook.ImportHook(self._imported)
        self._plan: Plan | None = None
        self._states: dict[str, _State] = {}
        self._watched: frozenset[str] = frozenset()
        self._extended: set[str] = set()  # patches that replaced more since they were applied
        self._strict = False
        self._verbose: bool | None = None
        self._notes = NoteLog()
        self._peaks = PeakLog()
        self._last = Report()

    def patch(self, *, strict: bool, verbose: bool | None, features: dict[str, Any]) -> Report:
        """Apply what is asked for; see :func:`trl_turbo.patch`."""
        switches = _plan.switches_of(features)
        changed = self._adopt(switches)
        with self._lock:
            self._strict, self._verbose = strict, verbose
        self._catch_up()
        with self._lock:
            found = self._publish()
        if strict and (bad := found.by_status(Status.SKIPPED, Status.FAILED)):
            self.unpatch(verbose=False)
            raise PatchError(f"patch(strict=True) took everything back: {_reasons(bad)}")
        if changed:
            self._announce(found, verbose)
        return found

    def unpatch(self, *, verbose: bool | None = None) -> Report:
        """Take everything back; see :func:`trl_turbo.unpatch`."""
        with self._lock:
            plan, self._plan = self._plan, None
            self._watched = frozenset()
            self._hook.watch(())
            self._ledger.restore()
            for state in self._states.values():
                state.module = None
                state.status, state.reason = Status.OFF, "unpatched"
            self._clear_kernels(plan)
            found = self._publish()
            if plan is not None:
                report.set_current(None)
                settings.set_current(None)
                patching.set_current(None)
                report.set_applied(None)
                self._notes = NoteLog()
                self._peaks = PeakLog()
        if plan is not None:
            self._announce(found, verbose, plan)
        return found

    def status(self) -> Report:
        """Return where every patch stands."""
        with self._lock:
            active = self._plan is not None
        if active:
            self._catch_up()
        with self._lock:
            return self._publish()

    def engine(self, config: Any) -> object | None:
        """Ask the plugins for a generation engine; ``None`` where nothing is patched or none has one."""
        with self._lock:
            plan = self._plan
        return plan.plugins.call("turbo_engine", config=config) if plan is not None else None

    def _extend(self, name: str, replacement: Replacement) -> None:
        """Serve :func:`trl_turbo.patching.extend`."""

        def wanted() -> bool:
            state = self._states.get(name)
            return self._plan is not None and state is not None and state.status is not Status.OFF

        if wanted() and not self._ledger.stands(name, replacement):
            self._extended.add(name)
            self._ledger.replace(name, (replacement,), wanted=wanted)

    def _applied(self) -> frozenset[str]:
        """Serve :func:`trl_turbo.report.applied_features`."""
        with self._lock:
            return frozenset(s.patch.feature for s in self._states.values() if s.status is Status.APPLIED)

    # -- intent ------------------------------------------------------------------------------------------------------

    def _adopt(self, switches: Switches) -> bool:
        """Make the plan that is asked for the current one; return whether it is another than before."""
        with self._lock:
            plan = self._plan
            known = plan is not None and switches.unknown(plan.features) is None
            if plan is not None and known and _plan.ask(switches, plan.features) == plan.asked:
                return False
        new = _plan.make(self._sources, switches)
        with self._lock:
            old = self._plan
            if old is not None and old.asked == new.asked:  # another thread was first
                return False
            self._plan = new
            self._reconcile(new)
            self._clear_kernels(old)
            self._set_kernels(new)
            report.set_current(self._publish())
            settings.set_current(dict(new.asked.settings))
            patching.set_current(self._extend)
            report.set_applied(self._applied)
        for sentence in new.warnings:
            self._notes.add("switches", sentence)
        return True

    def _reconcile(self, plan: Plan) -> None:
        states = {intent.patch.name: _State.of(intent) for intent in plan.intents}
        anew: set[str] = set()  # modules of which a patch is on now that was not
        for name, state in states.items():
            if state.status is not Status.PENDING:
                continue
            earlier = self._states.get(name)
            module = state.patch.module
            if earlier is None or earlier.module is None:
                anew.add(module)
            elif module not in anew or name in self._extended:
                # Still on, and tried already: it stays as it is. What follows a new patch on its module is applied
                # again, so that the later one wraps the earlier one as if both had been asked for at once.
                states[name] = earlier
        gone = [name for name, state in self._states.items() if states.get(name) is not state]
        self._states = states
        self._ledger.restore(gone)
        # What is skipped is watched too: it is worth a warning only where its module is used.
        watched = {state.patch.module for state in states.values() if state.status is not Status.OFF}
        self._watched = frozenset(watched)
        self._hook.watch(self._watched)

    def _set_kernels(self, plan: Plan) -> None:
        for op, device, dtype, function in plan.overrides:
            plan.kernels.set_override(op, device, dtype, function)

    def _clear_kernels(self, plan: Plan | None) -> None:
        if plan is not None and plan.kernels is not None:
            plan.kernels.clear_overrides()

    # -- application -------------------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Apply what is pending and whose module is there."""
        for state in self._waiting():
            module = _import_hook.settle(state.patch.module)
            if module is None:
                continue
            if _import_hook.is_importing(module) and _import_hook.call_when_imported(module, self._ended):
                continue
            self._try(state, module)

    def _waiting(self) -> list[_State]:
        with self._lock:
            return [state for state in self._states.values() if state.status is Status.PENDING]

    def _imported(self, name: str, module: ModuleType) -> None:
        """A watched module has been imported, anew or for the first time, or reloaded."""
        with self._lock:
            if name not in self._watched:
                return
            self._ledger.forget_overwritten(module)
            concerned = [s for s in self._states.values() if s.patch.module == name and s.status is not Status.OFF]
            todo = [state for state in concerned if not state.settled]
            for state in todo:
                state.module = None
        self._finish_import(name, concerned, todo, module)

    def _ended(self, name: str, module: ModuleType) -> None:
        """A module that was running when it was first looked for has ended."""
        todo = [state for state in self._waiting() if state.patch.module == name]
        self._finish_import(name, todo, todo, module)

    def _finish_import(self, name: str, concerned: list[_State], todo: list[_State], module: ModuleType) -> None:
        try:
            for state in todo:
                self._try(state, module)
            with self._lock:
                found, plan, strict = self._publish(), self._plan, self._strict
                names = {state.patch.name for state in todo}
                bad = [row for row in found.by_status(Status.SKIPPED, Status.FAILED) if row.name in names]
                if strict and bad and plan is not None:
                    # The module is dropped by the import system: what it made of other modules must go too.
                    self._ledger.restore(names)
                    for state in todo:
                        state.module = None
                        state.status, state.reason = Status.PENDING, _PENDING.format(name)
            if strict and bad:
                raise PatchError(f"{name} was imported under patch(strict=True): {_reasons(bad)}")
            if plan is not None and concerned:
                self._announce(found, self._verbose, plan, only={state.patch.name for state in concerned})
        except PatchError:
            raise
        except Exception:
            # An import of the user's must not break for us.
            logger.exception("trl_turbo could not finish patching %s; call trl_turbo.status()", name)

    def _try(self, state: _State, module: ModuleType) -> None:
        """Apply one patch to its module; the outcome, whatever it is, goes into the state."""
        patch = state.patch

        def wanted() -> bool:
            return self._states.get(patch.name) is state and state.module is not module and self._plan is not None

        try:
            misfit = patch.probe(module)
            labels = None if misfit is not None else self._ledger.apply(patch, module, wanted=wanted)
        except Exception as error:
            status, reason = Status.FAILED, f"{type(error).__name__}: {error}"
            logger.debug("%s failed", patch.name, exc_info=True)
        else:
            if misfit is not None:
                status, reason = Status.OFF if isinstance(misfit, Idle) else Status.SKIPPED, str(misfit)
            elif labels is None:
                return
            else:
                status, reason = Status.APPLIED, f"replaces {', '.join(labels)}"
        with self._lock:
            if wanted():
                state.module, state.status, state.reason = module, status, reason

    # -- telling -----------------------------------------------------------------------------------------------------

    def _publish(self) -> Report:
        blocked = self._ledger.blocked()
        rows = []
        for name, state in self._states.items():
            row = state.row
            if name in blocked and row.status is not Status.APPLIED:
                reason = _BLOCKED.format(", ".join(blocked[name]))
                row = Row(row.name, row.feature, Status.BLOCKED, reason, row.target, row.summary, row.source)
            rows.append(row)
        for name in sorted(blocked.keys() - self._states.keys()):  # its plugin is gone meanwhile
            reason = _BLOCKED.format(", ".join(blocked[name]))
            rows.append(Row(name, name.partition(".")[0], Status.BLOCKED, reason))
        failures: Iterable[Row] = ()
        versions = self._last.versions
        if self._plan is not None:
            failures, versions = self._plan.plugins.failures, self._plan.versions
        self._last = Report([*rows, *failures], versions, self._notes, self._peaks)
        return self._last

    def _announce(
        self, found: Report, verbose: bool | None, plan: Plan | None = None, only: Iterable[str] | None = None
    ) -> None:
        plan = plan or self._plan
        if plan is not None:
            plan.plugins.call("turbo_report", report=found)
        if verbose is False:
            return
        shown = found if only is None else Report([row for row in found if row.name in set(only)])
        bad = shown.by_status(Status.FAILED, Status.BLOCKED) or any(
            _import_hook.loaded(row.target) for row in shown.by_status(Status.SKIPPED)
        )
        level = logging.WARNING if bad else logging.INFO
        logger.log(level, "trl_turbo %s: %s", found.versions.get("trl_turbo"), shown.headline())
        if verbose:
            for line in str(found).splitlines():  # a record a line: what reads logs by line would tear the table
                logger.info("%s", line)


def _reasons(rows: Iterable[Row]) -> str:
    return "; ".join(f"{row.name} {row.status} ({row.reason})" for row in rows)
