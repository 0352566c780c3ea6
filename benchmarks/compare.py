"""Compare a new result with the committed one of the same command on the same card.

    python -m benchmarks.compare /tmp/NEW.json [--slower 0.1] [--larger 0.03]

Exits with 1 where a time, a rate or a peak got worse by more than is allowed, with 2 where there is nothing to compare
with. Times on hosts that differ are worth little: what a run measured of a peer in the same call is told beside.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
#: A number's name ends in its unit, and the unit says what is better.
TIMES, RATES, SIZES = ("_ms", "_s"), ("tokens_s", "gbps"), ("_gb", "_mib", "_bytes")
#: Rates that end like times, and what is no measure of ours.
IGNORED = ("low_ms", "high_ms", "loaded_gb", "in_use_at_first_gb", "copy_gbps", "cap_gb", "predicted_gb")


@dataclass(frozen=True)
class Change:
    """One number in both files.

    Attributes:
        name: Where it stands, as ``results / trl_turbo / peak_gb``.
        old: In the committed file.
        new: In the new one.
        worse: By which share it is worse; negative where it is better.
        allowed: By which it may be.
    """

    name: str
    old: float
    new: float
    worse: float
    allowed: float


def changes(old: Any, new: Any, slower: float, larger: float, path: tuple[str, ...] = ()) -> Iterator[Change]:
    """All numbers with a unit that both have.

    Raises:
        ValueError: Two rows in the same place are of different cases.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            if key in new and key not in ("plan", "phases", "environment", "moments"):
                yield from changes(old[key], new[key], slower, larger, (*path, key))
    elif isinstance(old, list) and isinstance(new, list):
        rows = [x for x in (*old, *new) if isinstance(x, dict)]
        if not rows:
            return  # single samples
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            if _case(a) != _case(b):
                raise ValueError(
                    f"row {i} of {' / '.join(path)} is of {_case(a)} in one file and {_case(b)} in the other"
                )
            yield from changes(a, b, slower, larger, (*path, str(i)))
    elif _is_number(old) and _is_number(new) and old > 0:
        name = path[-1]
        unit = next((each for each in path[::-1] if not each.isdigit()), name)
        if unit in IGNORED or any(part in IGNORED for part in path):
            return
        if unit.endswith(RATES):
            yield Change(" / ".join(path), old, new, old / new - 1 if new else float("inf"), slower)
        elif unit.endswith(TIMES):
            yield Change(" / ".join(path), old, new, new / old - 1, slower)
        elif any(part.endswith(SIZES) for part in path):
            yield Change(" / ".join(path), old, new, new / old - 1, larger)


def committed(new: dict[str, Any], folder: Path = RESULTS) -> Path | None:
    """The committed file of the same command and card, `None` where there is none."""
    wanted = _identity(new)
    for path in sorted(folder.glob("*.json")):
        if _identity(json.loads(path.read_text())) == wanted:
            return path
    return None


def _identity(data: dict[str, Any]) -> tuple[str, ...]:
    """Command, without where it writes and which folders it reads, and card."""
    about = data.get("environment", {})
    words = shlex.split(about.get("command", ""))
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in ("--out", "--folder", "--turbo-path"):
            skip = True
        else:
            kept.append(re.sub(r"=/.*", "=", word))
    return (*kept, str(about.get("card")))


def _case(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        return {}
    return {key: value for key, value in row.items() if isinstance(value, (str, bool)) or key in ("n", "h", "rank")}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def main(arguments: list[str]) -> int:
    """Compare, print what changed, and say whether anything got worse."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("new", type=Path)
    parser.add_argument("--with", dest="old", type=Path, help="a file to compare with, instead of the committed one")
    parser.add_argument("--slower", type=float, default=0.1, help="share by which a time may grow or a rate shrink")
    parser.add_argument("--larger", type=float, default=0.03, help="share by which a size may grow")
    args = parser.parse_args(arguments)
    new = json.loads(args.new.read_text())
    old_path = args.old or committed(new)
    if old_path is None:
        print("no committed result is of this command on this card", file=sys.stderr)
        return 2
    old = json.loads(old_path.read_text())
    failed = _lost(old, new)
    found = [change for change in changes(old, new, args.slower, args.larger) if "trl_turbo" in change.name]
    peers = [change for change in changes(old, new, args.slower, args.larger) if "trl_turbo" not in change.name]
    if not found and not failed:
        print(f"{old_path.name} and {args.new.name} have no number of trl_turbo's in common", file=sys.stderr)
        return 2
    worse = [change for change in found if change.worse > change.allowed]
    for change in sorted(found, key=lambda change: -change.worse)[:20]:
        mark = "WORSE " if change in worse else "      "
        print(f"{mark}{change.name:<60} {change.old:>12.4g} -> {change.new:>12.4g}  {change.worse:+.1%} worse")
    if peers:
        middle = sorted(change.worse for change in peers)[len(peers) // 2]
        print(f"peers, in the same two calls: {middle:+.1%} worse at the median of {len(peers)} numbers")
    for name in failed:
        print(f"WORSE {name} has a result in {old_path.name} and an error now")
    print(f"{len(worse) + len(failed)} of {len(found) + len(failed)} got worse than allowed, against {old_path.name}")
    return int(bool(worse or failed))


def _lost(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Contestants of ours that had a result and have an error now."""
    before, now = old.get("results"), new.get("results")
    if not isinstance(before, dict) or not isinstance(now, dict):
        return []
    ours = [name for name in before if name.startswith("trl_turbo") and "error" not in before[name]]
    return [name for name in ours if "error" in now.get(name, {"error": ""})]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
