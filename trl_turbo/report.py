"""What is patched, in a table that is also data."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from trl_turbo import _logs

logger = _logs.get()


class Status(str, Enum):
    """Where a patch stands; compares equal to its plain string."""

    APPLIED = "applied"
    PENDING = "pending"
    SKIPPED = "skipped"
    OFF = "off"
    BLOCKED = "blocked"
    FAILED = "failed"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: Unique name of the patch, or ``plugin.<name>`` for a plugin that could not be used.
        feature: Keyword of ``patch()`` that turns it off.
        status: Where it stands.
        reason: Why, in words; what it replaces where it is applied.
        target: Dotted name of the module it patches.
        summary: What it does, in one line.
        source: The plugin that brought it.
    """

    name: str
    feature: str
    status: Status
    reason: str = ""
    target: str = ""
    summary: str = ""
    source: str = ""


@dataclass(frozen=True)
class Note:
    """Something a patch found at run time and the user should know."""

    feature: str
    text: str


class NoteLog:
    """The notes of one session, shared by every report of it. Thread-safe; a repeated note is kept and logged once."""

    def __init__(self, notes: Iterable[Note] = ()) -> None:
        self._lock = threading.Lock()
        self._notes: dict[Note, None] = dict.fromkeys(notes)

    def add(self, feature: str, text: str) -> None:
        """Keep and log a note, unless it is there already."""
        note = Note(feature, text)
        with self._lock:
            if note in self._notes:
                return
            self._notes[note] = None
        # Outside the lock: a logging handler may do anything, a note included.
        logger.warning("%s: %s", feature, " ".join(text.split()))

    def __iter__(self) -> Iterator[Note]:
        with self._lock:
            return iter(tuple(self._notes))


class PeakLog:
    """Memory of one session's trainings by phase, shared by every report of it. Thread-safe.

    Each phase has `predicted` and `measured`, in bytes of the device, as far as they are known; what is measured is the
    most that the driver reported at the end of a phase.
    """

    def __init__(self, peaks: Mapping[str, Mapping[str, int]] | None = None) -> None:
        self._lock = threading.Lock()
        self._peaks: dict[str, dict[str, int]] = {phase: dict(found) for phase, found in (peaks or {}).items()}

    def predict(self, phases: Mapping[str, int]) -> None:
        """Keep what a training that begins is predicted to take; what an earlier one took is forgotten."""
        with self._lock:
            self._peaks = {phase: {"predicted": size} for phase, size in phases.items()}

    def measure(self, phase: str, size: int) -> None:
        """Keep what a phase took, if it is the most so far."""
        with self._lock:
            found = self._peaks.setdefault(phase, {})
            found["measured"] = max(size, found.get("measured", 0))

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Phase -> what is known of it."""
        with self._lock:
            return {phase: dict(found) for phase, found in self._peaks.items()}


class Report:
    """The state that ``patch()``, ``unpatch()`` and ``status()`` return.

    The rows are those of the moment of the call. The notes belong to the session, so that a report printed at the end
    of training shows what was noted meanwhile.

    Args:
        rows: The rows, in the order in which patches apply.
        versions: Version of each package of interest, ``None`` where it is not installed.
        notes: The session's notes.
        peaks: The session's memory by phase.
    """

    def __init__(
        self,
        rows: Iterable[Row] = (),
        versions: Mapping[str, str | None] | None = None,
        notes: NoteLog | None = None,
        peaks: PeakLog | None = None,
    ) -> None:
        self.rows: tuple[Row, ...] = tuple(rows)
        self.versions: dict[str, str | None] = dict(versions or {})
        self._notes = notes if notes is not None else NoteLog()
        self._peaks = peaks if peaks is not None else PeakLog()

    @property
    def notes(self) -> tuple[Note, ...]:
        """The notes taken so far, each once."""
        return tuple(self._notes)

    @property
    def peaks(self) -> dict[str, dict[str, int]]:
        """Memory by phase, `predicted` and `measured`, in bytes; filled by a trainer under ``memory=True``."""
        return self._peaks.to_dict()

    def note(self, feature: str, text: str) -> None:
        """Add a note; it is shown in the table and logged once as a warning.

        Args:
            feature: The feature it is about, such as ``"logprob"``.
            text: What was found, in a sentence.
        """
        self._notes.add(feature, text)

    def by_status(self, *statuses: Status | str) -> tuple[Row, ...]:
        """Return the rows with one of these statuses, in table order."""
        wanted = {Status(status) for status in statuses}
        return tuple(row for row in self.rows if row.status in wanted)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __contains__(self, name: object) -> bool:
        return any(row.name == name for row in self.rows)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        known = ", ".join(row.name for row in self.rows) or "none"
        raise KeyError(f"no row is called {name!r}; the rows are: {known}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Report):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # the notes of a report grow

    def __repr__(self) -> str:
        return f"<Report {self.headline()}>"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists and strings."""
        rows = [{**asdict(row), "status": row.status.value} for row in self.rows]
        notes = [asdict(note) for note in self.notes]
        return {"versions": dict(self.versions), "rows": rows, "notes": notes, "peaks": self.peaks}

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return :meth:`to_dict` as JSON text."""
        import json

        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Rebuild a report from :meth:`to_dict`.

        Raises:
            KeyError: A part of the report is missing.
            TypeError: A row or a note has a field that is not known.
            ValueError: A row has a status that is not known.
        """
        rows = [Row(**{**row, "status": Status(row["status"])}) for row in data["rows"]]
        notes = NoteLog(Note(**note) for note in data["notes"])
        return cls(rows, data["versions"], notes, PeakLog(data.get("peaks")))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Rebuild a report from :meth:`to_json`; raises what :meth:`from_dict` raises."""
        import json

        return cls.from_dict(json.loads(text))

    def headline(self) -> str:
        """Return the counts in one line, with the reason of each row that was skipped, failed or is blocked."""
        parts = []
        for status in Status:
            rows = self.by_status(status)
            if not rows:
                continue
            part = f"{len(rows)} {status}"
            if status in (Status.SKIPPED, Status.FAILED, Status.BLOCKED):
                part += f" ({'; '.join(f'{row.name}: {row.reason}' for row in rows)})"
            parts.append(part)
        return ", ".join(parts) or "nothing is patched"

    def __str__(self) -> str:
        lines = [" | ".join(f"{name} {version or 'not installed'}" for name, version in self.versions.items())]
        if self.rows:
            table = [("status", "patch", "target", "what, or why not")]
            for status in Status:
                table += [
                    (status.value, row.name, row.target, _explain(row)) for row in self.rows if row.status is status
                ]
            widths = [max(len(cells[column]) for cells in table) for column in range(3)]
            lines += [
                "  ".join([*(c.ljust(w) for c, w in zip(cells, widths, strict=False)), cells[3]]).rstrip()
                for cells in table
            ]
        else:
            lines.append("nothing is patched: call trl_turbo.patch()")
        lines += [f"memory  {_phase(phase, found)}" for phase, found in self.peaks.items()]
        lines += [f"note  {note.feature}: {note.text}" for note in self.notes]
        return "\n".join(line for line in lines if line)


def _explain(row: Row) -> str:
    if row.status is Status.APPLIED:
        return row.summary
    return row.reason or row.summary


def _phase(name: str, found: Mapping[str, int]) -> str:
    words = [f"{kind} {found[kind] / (1 << 30):.2f} GiB" for kind in ("predicted", "measured") if kind in found]
    return f"{name}: {', '.join(words)}"


_current: Report | None = None


def set_current(report: Report | None) -> None:
    """Say to which report :func:`note` goes. Called by the session."""
    global _current
    _current = report


def current() -> Report:
    """Return the report of the running session; an empty one while nothing is patched."""
    found = _current
    return found if found is not None else Report()


def note(feature: str, text: str) -> None:
    """Add a note to the report of the running session; does nothing while nothing is patched.

    Args:
        feature: The feature it is about, such as ``"logprob"``.
        text: What was found, in a sentence.
    """
    report = _current
    if report is not None:
        report.note(feature, text)


def current_peaks() -> PeakLog | None:
    """Where the running session keeps memory by phase; ``None`` while nothing is patched."""
    return _current._peaks if _current is not None else None


_applied: Callable[[], frozenset[str]] | None = None


def set_applied(function: Callable[[], frozenset[str]] | None) -> None:
    """Say who knows which features are applied. Called by the session."""
    global _applied
    _applied = function


def applied_features() -> frozenset[str]:
    """The features of which at least one patch is applied now."""
    return frozenset() if _applied is None else _applied()
