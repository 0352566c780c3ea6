"""Run a case stock and patched, make sure that the patched run took our path, and apply the rule."""

from __future__ import annotations

import importlib
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
from trl_turbo.patches.logprob.request import Request

from .models import ALONE, MORE_VARIANTS, VARIANTS
from .rule import Outcome, assert_identical, assert_same
from .runs import Case, build, run, train

# From 1.15 on GRPO, RLOO and DPO score through a fused head of TRL's own
TRL_HAS_FUSED_HEAD = hasattr(importlib.import_module("trl.trainer.grpo_trainer"), "add_fused_lm_head")

_STOCK: WeakKeyDictionary[Case, tuple[Outcome, ...]] = WeakKeyDictionary()
_MORE: WeakKeyDictionary[Case, tuple[Outcome, ...]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Call:
    """One call of the kernel: what it was asked, and in which state."""

    dtype: torch.dtype
    autocast: bool
    grad: bool
    arguments: dict[str, Any]


@dataclass
class Path:
    """What a patched run went through.

    Attributes:
        requests: Every scoring pass that was asked for, in order.
        kernel: Every call of the kernel.
        through_head: How often a head was scored by calling it, a few rows at a time.
        notes: What the report says about the log-prob.
        others: What it says about other features.
    """

    requests: list[Request] = field(default_factory=list)
    kernel: list[Call] = field(default_factory=list)
    through_head: int = 0
    notes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def assert_ours(self, notes: tuple[str, ...] = ()) -> None:
        assert self.kernel or self.through_head, "nothing was scored by our kernel"
        unanswered = [request for request in self.requests if not request.answered]
        assert not unanswered, f"{len(unanswered)} of {len(self.requests)} scoring passes made logits: {unanswered[:2]}"
        assert len(self.notes) == len(notes), self.notes
        for note, expected in zip(self.notes, notes, strict=True):
            assert expected in note


@contextmanager
def patched(**features: Any) -> Iterator[Path]:
    """Patch TRL, with all that is on by default or these features, and watch what is scored by whom."""
    path = Path()

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def linear_logprob(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            autocast = torch.is_autocast_enabled(hidden.device.type)
            path.kernel.append(Call(hidden.dtype, autocast, torch.is_grad_enabled(), kwargs))
            return original(hidden, *args, **kwargs)

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
            yield path
    finally:
        found = report.notes[already:]
        path.notes = tuple(note.text for note in found if note.feature == "logprob")
        path.others = tuple(note.text for note in found if note.feature != "logprob")
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


def more(case: Case) -> tuple[Outcome, ...]:
    """Further perturbed runs of stock, kept for the session."""
    if case not in _MORE:
        _MORE[case] = tuple(run(case, variant) for variant in MORE_VARIANTS)
    return _MORE[case]


def _drawing_as_stock(case: Case) -> dict[str, bool]:
    """Packed rows draw other random numbers for dropout than the padded batch, so numbers are compared without them."""
    dropout = getattr(case.peft(), "lora_dropout", 0.0) if case.peft is not None else 0.0
    return {"packing": False} if dropout and not case.options.get("disable_dropout") else {}


def check(case: Case, notes: tuple[str, ...] = (), *, late: bool = False) -> Path:
    """Assert that a patched run equals stock by the rule and took our path, with these notes in the report.

    Args:
        case: What to train.
        notes: A part of each note.
        late: Whether `patch()` comes after the trainer was constructed.
    """
    skip_unless_known(case)
    plain, *perturbed = stock(case)
    trainer = build(case) if late else None
    with patched(**_drawing_as_stock(case)) as path:
        ours = train(trainer or build(case))
    path.assert_ours(notes)
    assert any(ours.series["norm of the gradient"]), "no step was taken, or none had a gradient"
    assert_same(plain, ours, perturbed, case.dtype, lambda: more(case))
    return path


def check_kept(case: Case, note: str) -> None:
    """Assert that a patched run is stock's, bit for bit, on TRL's own path, and that the report says why."""
    skip_unless_known(case)
    plain = stock(case)[0]
    with patched(**ALONE) as path:
        ours = run(case)
    assert any(note in text and "TRL's own path" in text for text in path.notes), path.notes
    assert not path.kernel
    assert not path.through_head
    assert_identical(plain, ours)


def check_against_plain_torch(case: Case) -> Path:
    """As `check`, for what stock refuses: the yardstick is our own seam with plain torch in the kernel's place."""
    skip_unless_known(case)

    def plainly(variant: str) -> Outcome:
        with patched(), replaced.object(forward, "_statistics", plain_statistics):
            return run(case, variant)

    plain, *perturbed = map(plainly, VARIANTS)
    with patched() as path:
        ours = run(case)
    path.assert_ours()
    assert_same(plain, ours, perturbed, case.dtype, lambda: [plainly(variant) for variant in MORE_VARIANTS])
    return path


def plain_statistics(
    head: Any, module: Any, pending: Any, targets: torch.Tensor, request: Request
) -> dict[str, torch.Tensor]:
    """`forward._statistics` with all logits in memory, made by calling the head as the model does."""
    logits = module(pending.hidden).float() * pending.logit_scale / request.temperature
    assert pending.softcap is None
    log_p = logits.log_softmax(-1)
    mask = targets != -100
    chosen = targets.clamp(min=0)
    answers = {
        "logps": lambda: log_p.gather(-1, chosen.unsqueeze(-1)).squeeze(-1),
        "entropy": lambda: -(log_p.exp() * log_p).sum(-1),
        "logsumexp": lambda: logits.logsumexp(-1).detach(),
        "logsumexp2": lambda: (2 * logits).logsumexp(-1).detach(),
        "mean_logit": lambda: logits.mean(-1).detach(),
        "top1": lambda: logits.argmax(-1) == chosen,
    }
    names = {"logps": "log_probs", "mean_logit": "mean_logits", "top1": "is_top1"}
    found = {names.get(name, name): answers[name]().masked_fill(~mask, 0) for name in request.outputs}
    if "entropy" in found and not request.entropy_grad:
        found["entropy"] = found["entropy"].detach()
    return {"targets": targets, "label_mask": mask, **found}
