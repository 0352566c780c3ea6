"""When a patched run agrees with a stock run: the one rule that every whole-trainer test applies.

Backward-error argument. A stock run rounds every product and sum, so its result is that of an exact run whose weights
differ in their last place, and nobody may claim more of it than that. Therefore the yardstick is stock itself: two
more stock runs start with every weight moved by a random +-1 unit in the last place (a relative 2^-23 in float32),
all else alike. Patched must be as close to stock as these are:

    max over steps |patched - stock|  <=  4 * max over both |perturbed - stock|  +  8 u * max(1, max |stock|)

with u the unit roundoff (2^-24 in float32). The factor 4 covers that the largest of two draws underestimates what
perturbations do (their spread is known to a factor of two or so, and patched may be unlucky by as much). Some spreads
have a long tail: the gradient's norm under RLOO's normalised advantages moved by 0.8 to 17 * 1e-5 in ten draws, the
first two of which were among the smallest. Where two say that patched is wider, four more are drawn, and stock's own
largest move counts: right results stay as near as that, and wrong ones do not come nearer. The last term
covers what a perturbation may leave as it was by luck: a result is rounded when it is stored, a few times on its way.

Runs use plain SGD: Adam divides a gradient by its own size, which turns rounding of a zero gradient into a full step.

Metrics that count on which side of a bound values fall are steps: a tie may go either way, and in the few digits of
bf16 and fp16 there are ties. They are compared in float32 alone.

Gradients and weight updates are compared tensor by tensor, by norm, so that a wrong gradient of one small tensor cannot
hide behind the others. Weights are compared by what training added to them: the perturbed runs start elsewhere. There,
the 1 of the last term is the norm of all tensors of the group: a gradient's unit is arbitrary, and some (the bias of a
key projection) are zero but for rounding, at the scale of the whole. What was added to a weight is known no better than
the weight itself is stored: its own norm counts where it is the larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

FACTOR = 4
ROUNDINGS = 8
COUNTED = ("accurac", "clip")


@dataclass
class Outcome:
    """What one run left behind.

    Attributes:
        series: Every metric by name, one number for each time it was logged or computed.
        tensors: Tensors by name, in groups (`gradient`, `update`).
        stored: Norm of the weight that the tensor of this name updates.
    """

    series: dict[str, list[float]] = field(default_factory=dict)
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    stored: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gap:
    """How far one quantity of the patched run is from stock, and how far it may be."""

    name: str
    found: float
    allowed: float

    @property
    def ratio(self) -> float:
        return self.found / self.allowed if self.allowed else math.inf if self.found else 0.0

    def __str__(self) -> str:
        return f"{self.name}: off by {self.found:.3e}, allowed {self.allowed:.3e}"


def ulp(dtype: torch.dtype) -> float:
    """The relative move of a weight by which stock is perturbed: one unit in the last place."""
    return torch.finfo(dtype).eps


Perturbed = Sequence[Outcome]


def gaps(stock: Outcome, patched: Outcome, perturbed: Perturbed, dtype: torch.dtype = torch.float32) -> list[Gap]:
    """Every quantity's gap, the widest (relative to what is allowed) first."""
    floor = ROUNDINGS * ulp(dtype) / 2
    for other in (patched, *perturbed):
        _same_shape(stock, other)
    found = []
    for name, series in stock.series.items():
        if dtype != torch.float32 and any(word in name for word in COUNTED):
            continue
        size = max([1.0, *(abs(x) for x in series if math.isfinite(x))])
        allowed = FACTOR * max(_farthest(series, p.series[name]) for p in perturbed) + floor * size
        found.append(Gap(name, _farthest(series, patched.series[name]), allowed))
    for group, tensors in stock.tensors.items():
        size = math.sqrt(sum(_norm(t) ** 2 for t in tensors.values()))
        for name, tensor in tensors.items():
            scale = max(size, stock.stored[name]) if group == "update" else size
            moved = max(_norm(p.tensors[group][name] - tensor) for p in perturbed)
            gap = _norm(patched.tensors[group][name] - tensor)
            found.append(Gap(f"{group} of {name}", gap, FACTOR * moved + floor * scale))
    return sorted(found, key=lambda gap: -gap.ratio if not math.isnan(gap.ratio) else -math.inf)


def broken(
    stock: Outcome, patched: Outcome, perturbed: Sequence[Outcome], dtype: torch.dtype = torch.float32
) -> list[Gap]:
    """The gaps that are wider than allowed."""
    return [gap for gap in gaps(stock, patched, perturbed, dtype) if not gap.found <= gap.allowed]


def assert_same(
    stock: Outcome,
    patched: Outcome,
    perturbed: Perturbed,
    dtype: torch.dtype = torch.float32,
    more: Callable[[], Perturbed] = tuple,
) -> None:
    """Assert that no gap is wider than allowed; `more` draws further perturbed runs, where one is."""
    wide = broken(stock, patched, perturbed, dtype)
    if wide:
        wide = broken(stock, patched, [*perturbed, *more()], dtype)
    assert not wide, f"{len(wide)} quantities differ from stock: " + "; ".join(map(str, wide[:8]))


def assert_identical(one: Outcome, other: Outcome) -> None:
    """Bit for bit."""
    _same_shape(one, other)
    for name, series in one.series.items():
        assert _farthest(series, other.series[name]) == 0, name
    for group, tensors in one.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.tensors[group][name]), f"{group} of {name}"


def _same_shape(one: Outcome, other: Outcome) -> None:
    """Both runs logged the same metrics, as often, and trained the same tensors."""
    shapes = [{k: len(v) for k, v in run.series.items()} for run in (one, other)]
    odd = {name: [shape.get(name) for shape in shapes] for name in shapes[0].keys() | shapes[1].keys()}
    assert shapes[0] == shapes[1], {name: pair for name, pair in odd.items() if pair[0] != pair[1]}
    assert one.tensors.keys() == other.tensors.keys()
    for group, tensors in one.tensors.items():
        odd_ones = tensors.keys() ^ other.tensors[group].keys()
        assert not odd_ones, f"{group} in one run alone: {sorted(odd_ones)}"


def _farthest(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest distance; the same infinity or NaN in both is none, in one alone it is infinite."""
    return max((_distance(a, b) for a, b in zip(one, other, strict=True)), default=0.0)


def _distance(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf


def _norm(tensor: torch.Tensor) -> float:
    return tensor.double().norm().item()
