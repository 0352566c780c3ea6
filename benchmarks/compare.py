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
OURS = "trl_turbo"
#: A number's name ends in its unit, and the unit says what is better.
TIMES, RATES, SIZES = ("_us", "_ms", "_s"), ("tokens_s", "gbps", "longest"), ("_gb", "_mib", "_bytes")
#: Spread, and what is no measure.
IGNORED = (
    "low_us",
    "high_us",
    "low_ms",
    "high_ms",
    "loaded_gb",
    "in_use_at_first_gb",
    "copy_gbps",
    "cap_gb",
    "predicted_gb",
    "bar_ms",
)
SKIPPED = ("plan", "phases", "environment", "moments", "from_trainer_gb", "engine", "memory")
#: What tells one row from another, beside all words.
CASE = ("n", "m", "h", "hidden", "rank", "completion", "tokens", "heads", "length")


@dataclass(frozen=True)
class Change:
    """One number in both files.

    Attributes:
        name: Where it stands, as ``results / trl_turbo / peak_gb``.
        old: In the committed file.
        new: In the new one.
        worse: By which share it is worse; negative where it is better.
        allowed: By which it may be.
        ours: Whether it is not a peer's.
    """

    name: str
    old: float
    new: float
    worse: float
    allowed: float
    ours: bool


@dataclass(frozen=True)
class Rule:
    """By which share a number may get worse.

    Attributes:
        slower: Times and rates.
        larger: Sizes.
    """

    slower: float = 0.1
    larger: float = 0.03

    def changes(self, old: Any, new: Any, path: tuple[str, ...] = (), ours: bool = True) -> Iterator[Change]:
        """All numbers with a unit that both have.

        Raises:
            ValueError: A list of rows has no row of the same case in both.
        """
        if isinstance(old, dict) and isinstance(new, dict):
            contest = any(key.startswith(OURS) for key in old)  # then what has another name is a peer's
            for key in old.keys() & new.keys() - set(SKIPPED):
                mine = ours and (not contest or key.startswith(OURS))
                yield from self.changes(old[key], new[key], (*path, key), mine)
        elif isinstance(old, list) and isinstance(new, list):
            yield from self._rows(old, new, path, ours)
        elif _is_number(old) and _is_number(new) and old > 0:
            worse = self._worse(path, old, new)
            if worse is not None:
                yield Change(" / ".join(path), old, new, *worse, ours)

    def _rows(self, old: list[Any], new: list[Any], path: tuple[str, ...], ours: bool) -> Iterator[Change]:
        before, now = _by_case(old), _by_case(new)
        if not before:
            return  # single samples
        if not before.keys() & now.keys():
            raise ValueError(f"{' / '.join(path)} has no row of the same case in both files")
        for case in before.keys() & now.keys():
            yield from self.changes(before[case], now[case], (*path, case), ours)

    def _worse(self, path: tuple[str, ...], old: float, new: float) -> tuple[float, float] | None:
        """By which share it is worse and may be; `None` for what has no unit."""
        if any(part in IGNORED for part in path):
            return None
        if any(part.endswith(SIZES) for part in path):
            return new / old - 1, self.larger
        name = path[-1]
        if name.endswith(RATES):
            return (old / new - 1 if new else float("inf")), self.slower
        return (new / old - 1, self.slower) if name.endswith(TIMES) else None


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


def _case(row: dict[str, Any]) -> str:
    """What a row is about, in words."""
    told = {key: value for key, value in row.items() if key in CASE or isinstance(value, str)}
    return ", ".join(f"{key} {value}" for key, value in told.items() if key != "out_of_memory") or "row"


def _by_case(rows: list[Any]) -> dict[str, Any]:
    """Rows by what they are about; those that words do not tell apart, by their order."""
    found: dict[str, Any] = {}
    for row in rows:
        if isinstance(row, dict):
            case = _case(row)
            again = sum(1 for key in found if key.partition(" #")[0] == case)
            found[f"{case} #{again + 1}" if again else case] = row
    return found


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
    both = list(Rule(args.slower, args.larger).changes(old, new))
    found, peers = [c for c in both if c.ours], [c for c in both if not c.ours]
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
    ours = [name for name in before if name.startswith(OURS) and "error" not in before[name]]
    return [name for name in ours if "error" in now.get(name, {"error": ""})]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
