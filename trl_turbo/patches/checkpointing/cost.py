"""What copying costs, measured while it happens: how long the device waited for copies, of a whole pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl_turbo.patches.checkpointing.lane import Lane
from trl_turbo.report import note

#: The share of forward and backward that may go into waiting for copies; a step, with its rollout, is longer.
LARGEST_SHARE = 0.03


@dataclass
class _Pass:
    """One forward and backward, or several that are in flight together.

    Between the two, as much else may happen as does where what was scored waits for its training step.

    Attributes:
        nbytes: Of an input.
        grown: How often memory had been pinned.
        begin: When forward began.
        forward_end: When the last input was saved.
        turn: When backward wanted the first one.
        end: When backward had come to the last layer so far.
        waits: Between which moments the device waited.
        copies: Between which moments something was copied out.
    """

    nbytes: int
    grown: int
    begin: Any
    forward_end: Any = None
    turn: Any = None
    end: Any = None
    waits: list[tuple[Any, Any]] = field(default_factory=list)
    copies: list[tuple[Any, Any]] = field(default_factory=list)


class Costs:
    """Whether copying inputs of a size is worth it: yes until it was measured, then by what was found.

    Sizes are told apart by powers of two: what short sequences do not hide behind their layers, long ones may. A pass
    in which memory was pinned is not taken: that stops the device, once.

    Args:
        lane: Whose copies.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._found: dict[int, float] = {}
        self._pass: _Pass | None = None

    def begin(self, nbytes: int) -> None:
        """A pass begins with an input of this size; what the last one cost is known by now."""
        self._judge()
        self._pass = None
        if nbytes.bit_length() not in self._found:
            self._pass = _Pass(nbytes, self._lane.grown, self._lane.now())

    def worth(self, nbytes: int) -> bool:
        """Whether inputs of this size are copied."""
        return self._found.get(nbytes.bit_length(), 0.0) <= LARGEST_SHARE

    def timed_copy(self, copy: Callable[[], Any]) -> Any:
        """Start a copy, and keep its time while a pass is measured."""
        if self._pass is None:
            return copy()
        begin = self._lane.now(copying=True)
        moment = copy()
        self._pass.copies.append((begin, self._lane.now(copying=True)))
        self._pass.forward_end = self._lane.now()
        return moment

    def timed_wait(self, moment: Any) -> None:
        """Let the device wait for a moment, and keep for how long."""
        if self._pass is None:
            self._lane.wait(moment)
            return
        begin = self._lane.now()
        self._lane.wait(moment)
        self._pass.waits.append((begin, self._lane.now()))

    def wanted(self) -> None:
        """Backward wants an input."""
        if self._pass is not None and self._pass.turn is None:
            self._pass.turn = self._lane.now()

    def reached(self) -> None:
        """Backward has come to one more layer."""
        if self._pass is not None:
            self._pass.end = self._lane.now()

    def _judge(self) -> None:
        done = self._pass
        if done is None or done.end is None or done.grown != self._lane.grown or not done.copies:
            return
        parts = [self._lane.milliseconds(*pair) for pair in ((done.begin, done.forward_end), (done.turn, done.end))]
        waits = [self._lane.milliseconds(*pair) for pair in done.waits]
        copies = [self._lane.milliseconds(*pair) for pair in done.copies]
        if any(time is None for time in (*parts, *waits, *copies)):
            return
        whole = sum(time or 0.0 for time in parts)
        if not whole:
            return
        share = sum(time or 0.0 for time in waits) / whole
        self._found[done.nbytes.bit_length()] = share
        longest = max(time or 0.0 for time in copies)
        speed = f" at {done.nbytes / longest / 1e6:.0f} GB/s" if longest else ""
        fate = "they stay on the device" if share > LARGEST_SHARE else "they are kept in host memory"
        note(
            "checkpointing",
            f"inputs of layers of {done.nbytes / 1e6:.0f} MB were copied{speed}, and the device waited for that "
            f"{share:.1%} of forward and backward: {fate}",
        )
