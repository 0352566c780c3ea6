"""`trl-turbo run`: patch, then run a script in this process as `python` would."""

from __future__ import annotations

import builtins
import importlib.machinery
import io
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """The command line cannot be understood; the message is the sentence to print."""


def split(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Split what follows the options of `run` into keywords of `patch()` and the script with its own arguments.

    Args:
        arguments: `--<feature>`, `--no-<feature>` and `--<setting>=<word>`, then the script, then anything.

    Raises:
        UsageError: There is no script.
    """
    keywords: dict[str, Any] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("--"):
        option = rest.pop(0)
        if option == "--":
            break
        name, equals, word = option[2:].partition("=")
        if equals:
            keywords[name.replace("-", "_")] = word
        elif name.startswith("no-"):
            keywords[name[3:].replace("-", "_")] = False
        else:
            keywords[name.replace("-", "_")] = True
    if not rest:
        raise UsageError("no script is named; write `trl-turbo run script.py`, with options of ours before the script")
    return keywords, rest


def run_script(script: str, arguments: Sequence[str]) -> int:
    """Run a script as `python SCRIPT ARGUMENT ...` would, and return the exit code; `SystemExit` passes through.

    It becomes the module `__main__` for good, as with `python`: threads and exit handlers that outlive it find their
    globals, and child processes of multiprocessing import it by its path. An exception is printed with the frames of
    the script and of what it called.
    """
    path = Path(script).absolute()  # as python has it in __file__ and in tracebacks
    try:
        with io.open_code(str(path)) as stream:
            source = stream.read()
    except OSError as error:
        sys.stderr.write(f"trl-turbo run: can't open file {script!r}: {error.strerror}\n")
        return 2
    sys.argv = [script, *arguments]
    # Of the script itself where it is a link, as python does
    sys.path[0] = str(path.resolve().parent)
    main = types.ModuleType("__main__")
    loader = importlib.machinery.SourceFileLoader("__main__", str(path))
    vars(main).update(__file__=str(path), __builtins__=builtins, __loader__=loader, __cached__=None)
    sys.modules["__main__"] = main
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(main))
    except SystemExit:
        raise
    except BaseException as error:
        found = error.with_traceback(_from_script(error.__traceback__))
        sys.excepthook(type(found), found, found.__traceback__)
        # What a shell reports of a python that is interrupted
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _from_script(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """The part of a traceback without the frames of this module, through which the script was started."""
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    return traceback


def planned(trainer: Any) -> str:
    """Where the memory of a trainer goes, or why that cannot be said."""
    import trl_turbo

    try:
        return str(trl_turbo.plan(trainer))
    except Exception as error:
        return f"trl-turbo run: no plan of memory: {error}"


def flush() -> None:
    """Flush what the script printed; a reader that is gone is no error of ours."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
