"""The table and charts in a notebook, in one output that is renewed in place."""

from __future__ import annotations

import time
from typing import Any

from trl_turbo.dashboard.record import Record

#: A drawing takes at most this share of the time.
SHARE = 0.05


class Notebook:
    """Shows one record in the output of the cell that trains."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._next = 0.0

    def show(self, record: Record) -> None:
        """Draw it, unless the last drawing is so recent that drawing would slow the training down."""
        if time.perf_counter() >= self._next:
            self._draw(record)

    def finish(self, record: Record) -> None:
        """Draw the whole of it."""
        if record.rows:
            self._draw(record)

    def _draw(self, record: Record) -> None:
        from IPython.display import HTML, display

        from trl_turbo.dashboard.html import fragment

        began = time.perf_counter()
        content = HTML(fragment(record))
        if self._handle is None:
            self._handle = display(content, display_id=True)
        else:
            self._handle.update(content)
        ended = time.perf_counter()
        self._next = ended + (ended - began) / SHARE


def is_here() -> bool:
    """Whether this process is the kernel of a notebook."""
    import sys

    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None
