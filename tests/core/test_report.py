"""The report as a table and as data."""

from __future__ import annotations

import json
import threading

import pytest

from trl_turbo.report import Note, NoteLog, Report, Row, Status

ROWS = [
    Row("a.failed", "a", Status.FAILED, "KeyError: 'x'", "trl.a", "does a", "mine"),
    Row("a.skipped", "a", Status.SKIPPED, "it needs trl<1, and trl 1.2.3 is installed", "trl.a", "does a", "mine"),
    Row("b.pending", "b", Status.PENDING, "applies when trl.b is imported", "trl.b", "does b", "mine"),
    Row("c.off", "c", Status.OFF, "turned off by patch(c=False)", "trl.c", "does c", "theirs"),
    Row("d.applied", "d", Status.APPLIED, "replaces D.d", "trl.long.name", "does d", "theirs"),
    Row("e.blocked", "e", Status.BLOCKED, "somebody else", "trl.e", "does e", "theirs"),
]


@pytest.fixture
def report():
    return Report(
        ROWS, {"trl_turbo": "0.1.0", "trl": "1.2.3", "vllm": None}, NoteLog([Note("a", "the head is adapted")])
    )


def test_table(report):
    assert str(report) == "\n".join(
        [
            "trl_turbo 0.1.0 | trl 1.2.3 | vllm not installed",
            "status   patch      target         what, or why not",
            "applied  d.applied  trl.long.name  does d",
            "pending  b.pending  trl.b          applies when trl.b is imported",
            "skipped  a.skipped  trl.a          it needs trl<1, and trl 1.2.3 is installed",
            "off      c.off      trl.c          turned off by patch(c=False)",
            "blocked  e.blocked  trl.e          somebody else",
            "failed   a.failed   trl.a          KeyError: 'x'",
            "note  a: the head is adapted",
        ]
    )


def test_json_round_trip(report):
    text = report.to_json()
    data = json.loads(text)
    assert data == report.to_dict()
    assert data["rows"][4] == {
        "name": "d.applied",
        "feature": "d",
        "status": "applied",
        "reason": "replaces D.d",
        "target": "trl.long.name",
        "summary": "does d",
        "source": "theirs",
    }
    again = Report.from_json(text)
    assert again == report
    assert again.rows == report.rows
    assert str(again) == str(report)
    assert again.to_json() == text


def test_rows_by_name_and_status(report):
    assert report["d.applied"].status == "applied" == str(Status.APPLIED)
    assert [row.name for row in report] == [row.name for row in ROWS]
    assert [row.name for row in report.by_status("failed", Status.SKIPPED)] == ["a.failed", "a.skipped"]
    assert "b.pending" in report
    assert "nothing" not in report
    with pytest.raises(KeyError, match=r"no row is called 'x'; the rows are: a\.failed"):
        report["x"]
    with pytest.raises(ValueError, match="'gone'"):
        report.by_status("gone")


def test_headline(report):
    assert report.headline() == (
        "1 applied, 1 pending, 1 skipped (a.skipped: it needs trl<1, and trl 1.2.3 is installed), 1 off, "
        "1 blocked (e.blocked: somebody else), 1 failed (a.failed: KeyError: 'x')"
    )
    assert Report().headline() == "nothing is patched"


def test_reports_compare_by_content(report):
    assert report == Report.from_dict(report.to_dict())
    assert report != Report()
    assert report != "report"
    with pytest.raises(TypeError):
        hash(report)


def test_notes_are_kept_and_logged_once(caplog):
    report = Report()
    threads = [threading.Thread(target=lambda: [report.note("a", str(i % 5)) for i in range(200)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(note.text for note in report.notes) == ["0", "1", "2", "3", "4"]
    assert sorted(caplog.messages) == [f"a: {i}" for i in range(5)]
    assert {record.levelname for record in caplog.records} == {"WARNING"}
