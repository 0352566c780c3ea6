"""The logger of the package: one line a record, and one process that speaks for all."""

from __future__ import annotations

import logging
import os

#: What launchers call the rank of a process, in the order in which accelerate looks.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def rank() -> int:
    """Return the rank of this process as its launcher says it, 0 where none does."""
    for name in RANKS:
        text = os.environ.get(name, "")
        if text.isdigit():
            return int(text)
    return 0


def _speaks(record: logging.LogRecord) -> bool:
    # What is wrong on one rank alone is worth a line; all else is the same on each
    return record.levelno >= logging.ERROR or rank() == 0


def get() -> logging.Logger:
    """Return the logger ``trl_turbo``, which is silent below an error on ranks other than 0."""
    logger = logging.getLogger("trl_turbo")
    if _speaks not in logger.filters:
        logger.addFilter(_speaks)
    return logger
