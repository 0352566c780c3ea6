"""Run a case stock and patched, make sure that the patched run took our path, and apply the rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch as replaced
from weakref import WeakKeyDictionary

import pytest
import torch

import trl_turbo
from trl_turbo.patches.logprob import forward, fused_head
from trl_turbo.patches.logprob.request import Request, entropy_has_gradient

from .models import VARIANTS
from .rule import Outcome, assert_same
from .runs import Case, run

_STOCK: WeakKeyDictionary[Case, tuple[Outcome, ...]] = WeakKeyDictionary()


@dataclass
class Path:
    """What a patched run went through.

    Attributes:
        requests: Every scoring pass that was asked for, in order.
        kernel: The call of the kernel for each head, as keyword arguments.
        through_head: How often a head was scored by calling it, a few rows at a time.
        notes: What the report says about it.
    """

    requests: list[Request] = field(default_factory=list)
    kernel: list[dict[str, Any]] = field(default_factory=list)
    through_head: int = 0
    notes: tuple[str, ...] = ()

    def assert_ours(self, notes: tuple[str, ...] = ()) -> None:
        assert self.kernel or self.through_head, "nothing was scored by our kernel"
        unanswered = [request for request in self.requests if not request.answered]
        assert not unanswered, f"{len(unanswered)} of {len(self.requests)} scoring passes made logits: {unanswered[:2]}"
        assert len(self.notes) == len(notes), self.notes
        for note, expected in zip(self.notes, notes, strict=True):
            assert expected in note


def cpu_counts_as_faster(hidden: Any, weight: Any, bias: Any, outputs: tuple[str, ...]) -> bool:
    """Stands for `fused_head.measured_faster`, which keeps TRL's own fused head (1.15 and later) on the CPU.

    With a trained head too, to compare that gradient; not where the entropy is differentiated, which ours is not asked
    for there.
    """
    return not torch.is_grad_enabled() or "entropy" not in outputs or not entropy_has_gradient()


@contextmanager
def patched(**features: bool) -> Iterator[Path]:
    """Patch TRL, and watch what is scored by whom. On TRL >= 1.15 our kernel is used on the CPU as well."""
    path = Path()

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def linear_logprob(*args: Any, **kwargs: Any) -> Any:
            path.kernel.append(kwargs)
            return original(*args, **kwargs)

        return linear_logprob

    init, head_logprob = Request.__init__, forward.head_logprob

    def remembered(self: Request, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        path.requests.append(self)

    def whole(*args: Any, **kwargs: Any) -> Any:
        path.through_head += 1
        return head_logprob(*args, **kwargs)

    report = trl_turbo.patch(strict=True, verbose=False, **features)
    already = len(report.notes)
    try:
        with ExitStack() as stack:
            for module in (forward, fused_head):
                stack.enter_context(replaced.object(module, "linear_logprob", counted(module.linear_logprob)))
            stack.enter_context(replaced.object(forward, "head_logprob", whole))
            stack.enter_context(replaced.object(Request, "__init__", remembered))
            stack.enter_context(replaced.object(fused_head, "measured_faster", cpu_counts_as_faster))
            yield path
    finally:
        path.notes = tuple(note.text for note in report.notes[already:])
        trl_turbo.unpatch()


def skip_unless_known(case: Case) -> None:
    missing = case.missing()
    if missing:
        pytest.skip(missing)


def stock(case: Case) -> tuple[Outcome, ...]:
    """The stock run and the perturbed ones, kept for the session."""
    if case not in _STOCK:
        _STOCK[case] = tuple(run(case, variant) for variant in VARIANTS)
    return _STOCK[case]


def check(case: Case, notes: tuple[str, ...] = ()) -> Path:
    """Assert that a patched run equals stock by the rule and took our path, with these notes in the report."""
    skip_unless_known(case)
    plain, *perturbed = stock(case)
    with patched() as path:
        ours = run(case)
    path.assert_ours(notes)
    assert_same(plain, ours, perturbed, case.dtype)
    return path
