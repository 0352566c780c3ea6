"""GRPO runs of two ranks in which one dies where it is told to; started by `test_faults`.

What every rank did goes into a file of its own, a line for each thing, so that nothing is lost with a process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import trl_turbo

from .adapters import lora
from .forked import on_ranks
from .parity import patched as all_patched
from .runs import Case, build, forget_precision

STEPS = 8
# A prompt a step, so that all are in the first epoch: TRL takes prompts in the first one's order after resuming in any
OPTIONS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 1,
    "beta": 0.1,
    "steps_per_generation": 1,
    "num_generations": 8,
}


@dataclass(frozen=True)
class Fault:
    """What happens in one attempt.

    Attributes:
        how: `kill` or `raise`.
        place: `rollout`, `backward` or `checkpoint`.
        rank: Whose.
        after: Once the trainer has completed this many steps.
    """

    how: str
    place: str
    rank: int
    after: int


#: Each attempt goes on where the one before it ended, and its rank dies in the second step that it makes.
FAULTS = (
    Fault("kill", "rollout", 1, 1),
    Fault("kill", "backward", 0, 2),
    Fault("kill", "checkpoint", 0, 4),
    Fault("kill", "checkpoint", 1, 5),
    Fault("raise", "rollout", 0, 5),
    Fault("raise", "backward", 1, 6),
    Fault("raise", "checkpoint", 1, 8),
)


class Diary:
    """What a rank did in one attempt, line by line."""

    def __init__(self, out: Path, attempt: int) -> None:
        self.rank, self._attempt = int(os.environ["RANK"]), attempt
        self._path = out / f"diary-{self.rank}.jsonl"

    def write(self, what: str, **more: Any) -> None:
        line = {"what": what, "attempt": self._attempt, "time": time.time(), "pid": os.getpid(), **more}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def rig(trainer: Any, fault: Fault | None, diary: Diary) -> None:
    """Write down what a trainer does, and let it die where the fault says."""

    def strike(place: str) -> None:
        if fault is None or (place, diary.rank) != (fault.place, fault.rank) or trainer.state.global_step < fault.after:
            return
        diary.write("struck", **asdict(fault))
        if fault.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError(f"planted in {place} on rank {diary.rank}")

    def around(name: str, method: Callable[..., Any]) -> None:
        original = getattr(trainer, name)
        setattr(trainer, name, lambda *args, **kwargs: method(original, *args, **kwargs))

    def training_step(original: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        diary.write("trained", step=trainer.state.global_step + 1, loss=loss.item())
        return loss

    def generate(original: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        diary.write("sampled", step=trainer.state.global_step + 1, prompts=list(prompts))
        strike("rollout")
        return original(prompts, *args, **kwargs)

    def save_own_part(original: Any, *args: Any, **kwargs: Any) -> Any:
        strike("checkpoint")
        return original(*args, **kwargs)

    around("training_step", training_step)
    around("_generate_single_turn", generate)
    # The first rank has written weights and optimizer by then, the other one has nothing else to write
    around("_save_rng_state" if diary.rank else "_save_scaler", save_own_part)
    # Some gradients are there, and the other rank waits for those of the rest
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trained[len(trained) // 2].register_hook(lambda _: strike("backward"))


def rank(out: str, attempt: int, fault: Fault | None, patched: bool) -> None:
    """Train on this rank, from the last checkpoint where there is one."""
    root = Path(out)
    diary = Diary(root, attempt)
    diary.write("started")
    report = trl_turbo.patch(strict=True, verbose=False) if patched else None
    trainer = build(Case("GRPO", OPTIONS, peft=lora(), canned=False))
    trainer.args.output_dir = str(root / "run")
    rig(trainer, fault, diary)
    # Not `runs.train`, which gives all ranks one seed
    trainer.train(resume_from_checkpoint=any(root.glob("run/checkpoint-*")) or None)
    notes = [note.text for note in report.notes if note.feature == "resume"] if report is not None else []
    diary.write("finished", notes=notes)
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    torch.save(weights, root / f"weights-{diary.rank}.pt")
    torch.distributed.destroy_process_group()


def job(out: Path, attempt: int = 0, fault: Fault | None = None, *, patched: bool = True) -> None:
    """Start two ranks. When they ended, and what the launcher said of a failure, goes into `jobs.jsonl`."""
    out.mkdir(exist_ok=True)
    error = ""
    try:
        on_ranks(2, rank, str(out), attempt, fault, patched)
    except ChildFailedError as failure:
        error = str(failure)
    with (out / "jobs.jsonl").open("a") as file:
        file.write(json.dumps({"attempt": attempt, "ended": time.time(), "error": error}) + "\n")


def main(out: str) -> None:
    torch.set_num_threads(1)
    root = Path(out)
    with all_patched():
        # What this imports, no rank imports again
        build(Case("GRPO", {**OPTIONS, "per_device_train_batch_size": 8}, peft=lora()))
    forget_precision()
    job(root / "whole")
    for attempt, fault in enumerate((*FAULTS, None)):
        job(root / "faults", attempt, fault)
    # What transformers makes of the same half-written checkpoint
    for attempt, fault in enumerate((FAULTS[2], None)):
        job(root / "stock", attempt, fault, patched=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
