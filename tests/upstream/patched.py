"""A pytest plugin that patches TRL before its tests are collected, and prints the report at the end."""

from __future__ import annotations

from typing import Any

import trl_turbo


def pytest_configure(config: Any) -> None:
    trl_turbo.patch()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(str(trl_turbo.status()))
