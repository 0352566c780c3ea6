"""What is trained on before the optimizer steps is scored once: same training, fewer forwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from trl_turbo.patches.shared_pass import room
from trl_turbo.patches.shared_pass import trainer as shared
from trl_turbo.patches.shared_pass.room import Room, fitting

from .adapters import lora
from .parity import check
from .runs import Case, parity_reward

pytestmark = pytest.mark.trl


def passes(path: Any) -> tuple[int, int]:
    """Scoring passes with gradients and without."""
    return sum(call.grad for call in path.kernel), sum(not call.grad for call in path.kernel)


#: One training step a rollout, as TRL's defaults have it
ONE_STEP = {"gradient_accumulation_steps": 1, "steps_per_generation": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "no-beta": {"beta": 0.0},
    "beta": {"beta": 0.1},
    "checkpointing": {"beta": 0.1, "gradient_checkpointing": True},
    "reentrant": {
        "beta": 0.0,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"beta": 0.0, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
}


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("option", OPTIONS)
def test_one_forward_less(option: str, peft: Any) -> None:
    case = Case("RLOO", {**ONE_STEP, **OPTIONS[option]}, peft=peft)
    path = check(case)
    with_gradient, without = passes(path)
    reference = with_gradient if OPTIONS[option]["beta"] else 0
    assert without == reference, "the old policy was scored in a pass of its own"
    assert with_gradient > 0


@dataclass(frozen=True)
class Several:
    """A rollout of two micro-batches, or of two passes over one.

    Attributes:
        options: Of the configuration.
        passes: With gradients and without; without `shared_pass` a rollout has one more of the latter.
        note: What the report says.
    """

    options: dict[str, Any]
    passes: tuple[int, int]
    note: str | None = None


ACCUMULATED = {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "max_steps": 2}
NO_ROOM = "more would take more memory than the KV cache leaves"
SEVERAL = {
    "accumulated": Several(ACCUMULATED, (4, 2), NO_ROOM),
    # Two rollouts of two micro-batches in one step of the optimizer
    "accumulated-twice": Several({**ACCUMULATED, "gradient_accumulation_steps": 4, "max_steps": 1}, (4, 2), NO_ROOM),
    "older-weights": Several({**ACCUMULATED, "gradient_accumulation_steps": 1}, (2, 1), "weights change between"),
    "two-iterations": Several({**ONE_STEP, "num_iterations": 2, "max_steps": 4}, (4, 0)),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_the_first_micro_batch_is_scored_once(name: str) -> None:
    case = SEVERAL[name]
    path = check(Case("RLOO", {"beta": 0.0, **case.options}))
    assert passes(path) == case.passes
    assert [str(case.note) in text for text in path.others] == [True] * (case.note is not None)


ROOM_FOR_ALL = {
    "accumulated": Several(ACCUMULATED, (4, 0)),
    "checkpointing": Several({**ACCUMULATED, "gradient_checkpointing": True}, (4, 0)),
    "reentrant": Several({**ACCUMULATED, **OPTIONS["reentrant"]}, (4, 0)),
    "older-weights": Several({**ACCUMULATED, "gradient_accumulation_steps": 1}, (2, 1), "weights change between"),
    # 14 micro-batches. The optimizer steps in the middle of the second and fifth rollout, and of the sixth because an
    # epoch of eight ends with an accumulation of two: what was kept there is thrown away for the weights' sake
    "unaligned": Several(
        {"gradient_accumulation_steps": 3, "steps_per_generation": 2, "max_steps": 5},
        (14 + 1, 2),
        "weights change between",
    ),
}


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("name", ROOM_FOR_ALL)
def test_all_micro_batches_are_scored_once_where_there_is_room(
    name: str, peft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Room, "further", lambda *_: 100)
    case = ROOM_FOR_ALL[name]
    path = check(Case("RLOO", {"beta": 0.0, **case.options}, peft=peft))
    assert passes(path) == case.passes
    assert [str(case.note) in text for text in path.others] == [True] * (case.note is not None)


def test_the_others_are_scored_on_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_TURBO_PACKING", "1")
    path = check(Case("RLOO", {"beta": 0.0, **ACCUMULATED}))
    assert passes(path) == (4, 2)


def test_micro_batches_that_cannot_be_foreseen_are_scored_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that draws random numbers moves TRL's shuffle; later rollouts are scored apart."""

    def drawing(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        torch.rand(())
        return parity_reward(completion_ids)

    monkeypatch.setattr(Room, "further", lambda *_: 100)
    case = Case("RLOO", {"beta": 0.0, **ACCUMULATED}, extra=lambda path: {"reward_funcs": drawing})
    path = check(case)
    assert ["micro-batches cannot be foreseen" in text for text in path.others] == [True]
    # Two were scored for nothing, then TRL's two passes over the second rollout and training on all four
    assert passes(path) == (2 + 4, 2)


def test_dropout_is_drawn_as_in_stock() -> None:
    """Two passes draw two masks: what has been scored in one is thrown away, and later rollouts are scored apart."""
    path = check(Case("RLOO", {**ONE_STEP, "beta": 0.0}, peft=lora(lora_dropout=0.5)))
    assert ["draws random numbers" in text for text in path.others] == [True]
    with_gradient, without = passes(path)
    assert without == with_gradient - 1


@pytest.mark.parametrize(
    ("free", "graph", "peak", "further"),
    [
        (800, 100, 0.0, 0),  # the rollouts by which the peak is seen
        (800, 100, 3.0, 5),  # 3 graphs' worth of the cache is training's own peak
        (800, 100, 8.0, 0),
        (800, 100, 9.0, 0),
        (0, 100, 3.0, 0),  # no cache was given up
        (849, 100, 3.0, 5),
        (800, 200, 3.0, 1),  # longer answers than in the rollout that was measured
    ],
)
def test_what_fits_beside_trainings_peak(free: int, graph: int, peak: float, further: int) -> None:
    assert fitting(free, graph, peak) == further
    assert not further or graph * (peak + further) <= free


@pytest.mark.parametrize("released", [1000, 0], ids=["engine", "none"])
def test_room_is_measured_once_torch_gave_up_what_it_did_not_use(
    released: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there before the first rollout, such as the start of an engine, is in torch's cache after it."""
    used, reserved = iter([1000, 1100, 1010, 1110, 1010, 1130]), {}
    cache = iter([0, released, released, released, released, released])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(used))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved["now"])
    monkeypatch.setattr(room, "released_bytes", lambda trainer: next(cache))
    found, device = Room(), torch.device("cuda")
    further, measuring = [], []
    for loaded, after_backward in ((9000, 9000), (9000, 1410), (1100, 1600)):  # an evaluation came after the second
        reserved["now"] = loaded
        found.begin(None, device)
        found.open(device)
        further.append(found.further(None, device))
        measuring.append(found.is_measuring)
        reserved["now"] = after_backward
        found.watch(device)
    # 1000 / 120 graphs, less the (1410 - 1010) / 100 of training
    assert further == [0, 0, 4 if released else 0]
    assert measuring == ([True, True, False] if released else [False] * 3)
    assert Room().further(None, torch.device("cpu")) == 0


def test_weights_that_changed_in_between_are_scored_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of what the reuse rests on."""
    count = iter(range(1000))
    monkeypatch.setattr(shared, "_versions", lambda model: (next(count),))
    path = check(Case("RLOO", {**ONE_STEP, "beta": 0.0}))
    with_gradient, without = passes(path)
    assert without == 0
    assert with_gradient % 2 == 0


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_TURBO_SHARED_PASS", "0")
    with_gradient, without = passes(check(Case("RLOO", {**ONE_STEP, "beta": 0.0})))
    assert without == with_gradient
