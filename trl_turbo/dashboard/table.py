"""The live table: the last value of everything that has a chart, and its course."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from trl_turbo.dashboard.record import Record

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 32


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Return the course of the last values in one line, from the lowest to the highest of them."""
    shown = values[-width:]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    span = high - low
    steps = len(BLOCKS) - 1
    return "".join(BLOCKS[round((value - low) / span * steps) if span else steps // 2] for value in shown)


def render(record: Record) -> Table:
    """Return the table of a record."""
    # Nothing to wrap and no frame: in a terminal each line is one that tqdm keeps in its place
    table = Table("", "last", "lowest", "highest", "course", box=None, pad_edge=False, show_edge=False)
    for title, series in record.series().items():
        for name, points in series.items():
            values = [value for _, value in points]
            shown = name if title != "Memory, GiB" else f"{name} (GiB)"
            numbers = (f"{value:.4g}" for value in (values[-1], min(values), max(values)))
            table.add_row(shown, *numbers, sparkline(values))
    for column in table.columns:
        column.no_wrap = True
    return table
