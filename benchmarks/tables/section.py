"""A section of the page that one JSON file is the source of."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOT_MEASURED = "Not measured yet."
#: The machine, the versions and the command.
About = dict[str, str]
#: A row for each setting.
Results = list[dict[str, Any]]


def section(table: Callable[[About, Results], str]) -> Callable[[Path], str]:
    """Make of a table of that name's JSON a section of a folder of results; it says so where that has no such file."""

    @functools.wraps(table)
    def of(folder: Path) -> str:
        path = folder / f"{table.__name__}.json"
        if not path.exists():
            return NOT_MEASURED
        data = json.loads(path.read_text())
        return table(data["environment"], data["results"])

    return of
