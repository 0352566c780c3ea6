"""The HTML report, and the part of it that a notebook shows: one file that fetches nothing."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from trl_turbo.dashboard.record import Record
from trl_turbo.dashboard.samples import Samples, text_of
from trl_turbo.dashboard.table import sparkline
from trl_turbo.report import Note

WITHOUT_CHARTS = "No charts: matplotlib is not installed; pip install 'trl-turbo[plot]' brings it."
_COLUMNS = 2


@functools.cache
def _templates() -> dict[str, Any]:
    # What a model writes is anything: it is escaped
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.globals.update(number=_number, sparkline=sparkline, text=text_of)
    found = Path(__file__).parent.glob("*.html.j2")
    return {path.name.partition(".")[0]: environment.from_string(path.read_text()) for path in found}


def page(record: Record, samples: Samples | None = None, notes: Iterable[Note] = ()) -> str:
    """Return the whole report as HTML."""
    return _templates()["report"].render(
        title=f"{record.facts.get('trainer', 'Training')}: what it logged",
        facts=record.facts,
        fragment=Markup(fragment(record)),  # escaped where it was rendered
        notes=list(notes),
        samples=Markup(samples_html(samples)) if samples else None,
    )


def fragment(record: Record) -> str:
    """Return the table of last values and the charts as HTML."""
    charts = {
        title: {name: [value for _, value in points] for name, points in series.items()}
        for title, series in record.series().items()
    }
    return _templates()["fragment"].render(charts=charts, svg=Markup(svg(record)))


def samples_html(samples: Samples) -> str:
    """Return completions as an HTML table."""
    names = list(dict.fromkeys(name for row in samples for name in row.rewards))
    return _templates()["samples"].render(rows=list(samples), names=names)


def svg(record: Record) -> str:
    """Return the charts as one SVG whose words are text, or why there are none, where matplotlib is not installed."""
    charts = record.series()
    if not charts:
        return "<p>Nothing was logged.</p>"
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return f"<p>{WITHOUT_CHARTS}</p>"
    rows = -(-len(charts) // _COLUMNS)
    # A Figure of its own: pyplot would pick a backend and keep it for the whole process
    figure = Figure(figsize=(11, 2.9 * rows), layout="constrained")
    for place, (title, series) in enumerate(charts.items(), 1):
        axes = figure.add_subplot(rows, _COLUMNS, place)
        for name, points in series.items():
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, linewidth=1.5, marker="o" if len(points) < 3 else None, markersize=3, label=name)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize="x-small")
        axes.grid(alpha=0.3)
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "trl_turbo"}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    return text[text.index("<svg") :]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
