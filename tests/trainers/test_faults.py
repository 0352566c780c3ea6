"""A rank dies in a rollout, in backward or in checkpointing: the job ends, says why, and can be resumed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from .fault_worker import FAULTS, STEPS
from .launched import launched

pytestmark = [pytest.mark.trl, pytest.mark.slow]

EXIT_S = 60


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Jobs:
    """All attempts in one folder, as ranks and launcher wrote them down."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.launched = lines(out / "jobs.jsonl")
        self.diaries = [lines(out / f"diary-{rank}.jsonl") for rank in range(2)]

    def said(self, rank: int, what: str) -> list[dict[str, Any]]:
        return [line for line in self.diaries[rank] if line["what"] == what]

    def trained(self, rank: int) -> dict[int, list[int]]:
        """The steps of each attempt."""
        steps = defaultdict(list)
        for line in self.said(rank, "trained"):
            steps[line["attempt"]].append(line["step"])
        return steps

    def course(self, rank: int) -> dict[int, tuple[Any, ...]]:
        """Loss and prompts of each step, as it was trained last."""
        losses = {line["step"]: line["loss"] for line in self.said(rank, "trained")}
        prompts = {line["step"]: line["prompts"] for line in self.said(rank, "sampled")}
        return {step: (loss, prompts[step]) for step, loss in losses.items()}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(tmp_path_factory, "fault_worker")


def test_the_job_ends_with_the_error_of_the_rank_that_died(out: Path) -> None:
    jobs = Jobs(out / "faults")
    for attempt, fault in enumerate(FAULTS):
        (struck,) = [line for line in jobs.said(fault.rank, "struck") if line["attempt"] == attempt]
        job = jobs.launched[attempt]
        assert job["ended"] - struck["time"] < EXIT_S
        cause = job["error"].partition("Root Cause")[2]
        wanted = "SIGKILL" if fault.how == "kill" else f"ArithmeticError: planted in {fault.place} on rank {fault.rank}"
        own = wanted in cause and f"rank      : {fault.rank} " in cause
        # Where both ended between two looks of the launcher's, it may name the one that was waiting for the other
        lost = f"rank      : {1 - fault.rank} " in cause and "gloo" in cause
        assert own or lost, (fault, job["error"])
    assert [job["error"] for job in jobs.launched[len(FAULTS) :]] == [""]
    for line in (line for diary in jobs.diaries for line in diary):
        assert not Path(f"/proc/{line['pid']}").exists(), "a rank is still there"


def test_no_step_is_lost_or_repeated(out: Path) -> None:
    jobs, whole = Jobs(out / "faults"), Jobs(out / "whole")
    for rank in range(2):
        steps = jobs.trained(rank)
        for attempt, fault in enumerate(FAULTS):
            # What was on every rank's way to the disk when it died is trained again, and nothing before that
            assert steps[attempt + 1][0] == fault.after + (fault.place != "checkpoint"), (fault, steps)
        assert jobs.course(rank) == whole.course(rank)
        assert sorted(jobs.course(rank)) == list(range(1, STEPS + 1))
        ours, theirs = (torch.load(each.out / f"weights-{rank}.pt") for each in (jobs, whole))
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name
    assert jobs.course(0) != jobs.course(1)
    state = json.loads((jobs.out / "run" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, STEPS + 1))


def test_what_was_skipped_is_said(out: Path) -> None:
    for rank in range(2):
        (finished,) = Jobs(out / "faults").said(rank, "finished")
        (note,) = finished["notes"]
        assert f"checkpoint-{STEPS} was not written to its end, and the run goes on from" in note
        assert note.endswith(f"checkpoint-{STEPS - 1}")


def test_control_transformers_does_not_resume_after_a_half_written_checkpoint(out: Path) -> None:
    """If this fails, transformers does what `patches.resume` is for, and that can go."""
    jobs = Jobs(out / "stock")
    assert "SIGKILL" in jobs.launched[0]["error"]
    assert "trainer_state.json" in jobs.launched[1]["error"]
