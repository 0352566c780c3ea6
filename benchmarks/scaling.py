"""A step's time on several ranks, from one rank's and from the speed of the links; checked against what was measured.

    python -m benchmarks.scaling benchmarks/results/ranks_ddp.json --ranks 2 4 8 16 --link-gbs 12

The model is small on purpose. Under DDP with as many sequences a rank as one has alone, a rank's own work stays what it
was. What is added is the all-reduce of the last bucket of gradients, the others being summed during backward, and
the wait for the rank that samples longest. It holds for links of one speed: between hosts, give the slower one's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: torch's DDP reduces gradients in buckets of so many bytes; the last one starts when backward has ended.
BUCKET_BYTES = 25 << 20


@dataclass(frozen=True)
class Link:
    """How fast ranks exchange, by one collective.

    Attributes:
        latency_s: What a call takes that moves next to nothing.
        bytes_s: Bytes a second that each rank sends in a large one.
    """

    latency_s: float
    bytes_s: float

    def seconds(self, nbytes: float, calls: int = 1) -> float:
        """The time of `calls` collectives in which each rank sends `nbytes` altogether."""
        return calls * self.latency_s + nbytes / self.bytes_s


def all_reduced(nbytes: float, ranks: int) -> float:
    """Bytes that each of so many ranks sends to sum a tensor over all, in a ring."""
    return 2 * (ranks - 1) / ranks * nbytes


def gathered(nbytes: float, ranks: int) -> float:
    """Bytes that each rank sends until all have a tensor of `nbytes` that was sharded."""
    return (ranks - 1) / ranks * nbytes


def wait_s(rollouts_s: list[list[float]]) -> float:
    """How long a rank waits on average for the one that samples longest, by what each took in each step.

    Args:
        rollouts_s: Seconds, [ranks][steps].
    """
    steps = list(zip(*rollouts_s, strict=True))
    return statistics.fmean(max(step) - statistics.fmean(step) for step in steps)


def ddp_step_s(alone_s: float, ranks: int, gradient_bytes: float, link: Link, waits_s: float = 0.0) -> float:
    """A step of DDP, each rank with as many sequences as one has alone.

    Args:
        alone_s: The step on one rank.
        ranks: How many there are.
        gradient_bytes: Of all that is trained.
        link: Of all-reduce.
        waits_s: For the slowest rollout.
    """
    if ranks == 1:
        return alone_s
    last = min(gradient_bytes, BUCKET_BYTES)
    return alone_s + waits_s + link.seconds(all_reduced(last, ranks))


def check(alone: dict[str, Any], several: dict[str, Any]) -> dict[str, float]:
    """The model's step time of a DDP run beside the one that was measured.

    Args:
        alone: Result of one rank.
        several: Result of several, with what `benchmarks.ranks` adds.
    """
    link = Link(**several["collectives"]["all_reduce"])
    waits = wait_s([rank["rollouts_s"] for rank in several["ranks"]])
    predicted = ddp_step_s(alone["step_s"], several["world"], several["gradient_bytes"], link, waits)
    return {
        "predicted_s": predicted,
        "measured_s": several["step_s"],
        "off_by": predicted / several["step_s"] - 1,
        "scaling": several["world"] * alone["step_s"] / several["step_s"],
    }


def main() -> int:
    """Print the predicted step and scaling for other numbers of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="JSON of `benchmarks.distributed --way ddp`")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--link-gbs", type=float, help="GB a second of a slower link than the one measured")
    parser.add_argument("--contestant", default="trl_turbo")
    args = parser.parse_args()
    data = json.loads(args.result.read_text())
    alone, several = (data["results"][f"{args.contestant} on {n}"] for n in (1, data["ranks"]))
    measured = several["collectives"]["all_reduce"]
    link = Link(measured["latency_s"], args.link_gbs * 1e9 if args.link_gbs else measured["bytes_s"])
    waits = wait_s([rank["rollouts_s"] for rank in several["ranks"]])
    for ranks in args.ranks:
        step = ddp_step_s(alone["step_s"], ranks, several["gradient_bytes"], link, waits)
        print(f"{ranks:>4} ranks  step {step:7.3f} s  {ranks * alone['step_s'] / step:6.2f}x the samples of one")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
