"""The table in a terminal, under the trainer's progress bar.

Each line of it is a tqdm line: transformers' bar is tqdm's, and what tqdm writes, clears and moves, ours included,
keeps its place. A live display of another library would draw over the bar, and the bar over it.
"""

from __future__ import annotations

import io
import shutil
from typing import Any

from trl_turbo.dashboard.record import Record
from trl_turbo.dashboard.table import render


class Terminal:
    """Shows the table of one record on the terminal of `stderr`."""

    def __init__(self) -> None:
        self._lines: list[Any] = []

    def show(self, record: Record) -> None:
        """Draw it, in the place of what was drawn before."""
        # The class that transformers' own bar has: tqdm keeps the order of lines for each class by itself
        from tqdm.auto import tqdm

        lines = self._text(record, colour=True).splitlines()
        # A bar above and a line of a nested one below; what does not fit is in the report
        lines = lines[: max(0, shutil.get_terminal_size().lines - 3)]
        for line, text in zip(self._lines, lines, strict=False):
            line.set_description_str(text)
        for text in lines[len(self._lines) :]:
            self._lines.append(tqdm(total=0, desc=text, bar_format="{desc}", leave=False, dynamic_ncols=True))

    def finish(self, record: Record) -> None:
        """Take the live lines away, and write the table once to stay."""
        from tqdm.auto import tqdm

        for line in reversed(self._lines):
            line.close()
        self._lines.clear()
        if record.rows:
            tqdm.write(self._text(record, colour=True).rstrip(), file=_stderr())

    @staticmethod
    def _text(record: Record, *, colour: bool) -> str:
        from rich.console import Console

        out = io.StringIO()
        width = shutil.get_terminal_size().columns - 1  # tqdm cuts a line that fills the last column
        Console(file=out, width=width, force_terminal=colour, color_system="standard" if colour else None).print(
            render(record)
        )
        return out.getvalue()


def _stderr() -> Any:
    import sys

    return sys.stderr
