"""Run TRL's own test files twice, as they are and patched, and compare every outcome.

    python tests/upstream/compare.py CHECKOUT [--stand-ins] [pytest arguments]

CHECKOUT is a clone of TRL at the installed version: the wheels and source archives carry no tests. The tests load
their models from a hub; with `--stand-ins` models of the same names and architectures are made here (`hub.py`), and no
network is needed. Without pytest arguments the files of the five trainers are run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

FILES = (
    "tests/test_grpo_trainer.py",
    "tests/test_rloo_trainer.py",
    "tests/test_dpo_trainer.py",
    "tests/experimental/test_online_dpo_trainer.py",
    "tests/experimental/test_ppo_trainer.py",
)
HERE = Path(__file__).resolve().parent
# By their own names: `tests` is the checkout's package
PATHS = (str(HERE), str(HERE.parents[1]))


def run(checkout: Path, arguments: list[str], *, patched: bool, hub: Path | None = None) -> dict[str, str]:
    """Outcome by test: `passed`, `failed`, `error` or `skipped`.

    Args:
        checkout: Where the tests are.
        arguments: For pytest.
        patched: Whether TRL is patched before.
        hub: A cache with stand-ins for what the hub has.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        plugins = [*(["-p", "patched"] if patched else []), *(["-p", "hub"] if hub is not None else [])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])}
        if hub is not None:
            environment |= {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", *plugins, f"--junit-xml={report}", *arguments]
        code = subprocess.run(command, cwd=checkout, env=environment, check=False).returncode
        if not report.exists():
            raise SystemExit(
                f"pytest left {checkout} with exit code {code} and no report: run {' '.join(command)} by hand."
            )
        return outcomes(report)


def outcomes(report: Path) -> dict[str, str]:
    """Read a JUnit report."""
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {"failure": "failed", "error": "error", "skipped": "skipped"}
        result = next((kinds[child.tag] for child in case if child.tag in kinds), "passed")
        found[f"{case.get('classname')}::{case.get('name')}"] = result
    return found


def differences(stock: dict[str, str], patched: dict[str, str]) -> list[str]:
    """One line for each test whose outcome is not the same."""
    return [
        f"{name}: {stock.get(name, 'not run')} stock, {patched.get(name, 'not run')} patched"
        for name in sorted(stock.keys() | patched.keys())
        if stock.get(name) != patched.get(name)
    ]


def main(arguments: list[str]) -> int:
    if not arguments or not (checkout := Path(arguments[0])).is_dir():
        raise SystemExit(f"a clone of TRL is needed as the first argument, found {arguments[:1]}; see this file's top.")
    stand_ins, given = "--stand-ins" in arguments, [each for each in arguments[1:] if each != "--stand-ins"]
    files = [name for name in FILES if (checkout / name).exists()]
    chosen = given or files
    if not chosen:
        raise SystemExit(f"{checkout} has none of {', '.join(FILES)}: name a clone of TRL, or the tests to run.")
    with tempfile.TemporaryDirectory() as folder:
        if stand_ins:
            fill = [sys.executable, str(HERE / "hub.py"), folder, *(str(checkout / name) for name in files)]
            subprocess.run(fill, check=True)
        hub = Path(folder) if stand_ins else None
        stock, patched = (run(checkout, chosen, patched=each, hub=hub) for each in (False, True))
    lines = differences(stock, patched)
    counts = {kind: sum(value == kind for value in stock.values()) for kind in sorted(set(stock.values()))}
    print(f"\n{len(stock)} tests stock {counts}; {len(lines)} differ patched", *lines, sep="\n")
    return 1 if lines or not stock else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
