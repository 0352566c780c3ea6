"""The callback of one training. It hears what the trainer tells its callbacks and changes nothing."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from trl_turbo import report
from trl_turbo.dashboard import memory, samples
from trl_turbo.dashboard.notebook import Notebook
from trl_turbo.dashboard.notebook import is_here as in_notebook
from trl_turbo.dashboard.record import Record, plain
from trl_turbo.dashboard.terminal import Terminal

LOG, REPORT = "metrics.jsonl", "report.html"


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """A display that fails must not end a training: it stops, and the report says why."""

    @functools.wraps(method)
    def call(self: Dashboard, *args: Any, **kwargs: Any) -> None:
        if self.stopped:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.stop()
            report.note(
                "dashboard", f"it stopped at step {self.step}, the training goes on: {type(error).__name__}: {error}"
            )

    return call


class Dashboard(TrainerCallback):
    """Shows a training, and writes what it logs into `<output_dir>/_trl_turbo`.

    Args:
        trainer: A TRL trainer, on rank 0.

    Attributes:
        record: What was logged so far.
        folder: Where the files are.
        stopped: Whether it is at its end.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.folder = Path(trainer.args.output_dir) / samples.FOLDER
        self.record = Record()
        self.stopped = False
        self.step = 0
        self._view = _view(trainer.args)
        self._memory: memory.PhaseMemory | None = None
        self._began = time.perf_counter()

    @_harmless
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Begin the log."""
        self.step = state.global_step
        self._began = time.perf_counter()
        model = self._trainer.model
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        self.record.facts = {
            "trainer": type(self._trainer).__name__,
            "model": name,
            "steps": state.max_steps,
            **({"resumed_at": state.global_step} if state.global_step else {}),
        }
        self.record.start(0.0)
        self.folder.mkdir(parents=True, exist_ok=True)
        # A run that goes on from a checkpoint adds to what it wrote before
        with (self.folder / LOG).open("a" if state.global_step else "w") as log:
            log.write(json.dumps({"run": self.record.facts}) + "\n")
        self._memory = memory.reader(str(args.device))
        memory.running.append(self._memory)
        self._memory.start()

    @_harmless
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """What follows is the optimizer's."""
        if self._memory is not None:
            self._memory.switch(memory.OPTIMIZER)

    @_harmless
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The optimizer is done."""
        if self._memory is not None:
            self._memory.switch(memory.TRAINING)

    @_harmless
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Keep, write and show what was logged."""
        self.step = state.global_step
        taken = self._memory.take() if self._memory is not None else {}
        row = self.record.add(logs or {}, step=self.step, time_s=time.perf_counter() - self._began, memory_bytes=taken)
        with (self.folder / LOG).open("a") as log:
            log.write(json.dumps(row) + "\n")
        found = self.samples()
        if found:
            samples.write(found, self.folder)
        if self._view is not None:
            self._view.show(self.record)

    @_harmless
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Write the report."""
        self.finish()

    def samples(self, n: int = 8) -> samples.Samples | None:
        """The completions that were sampled last, or `None` where the trainer keeps none."""
        try:
            return samples.samples(self._trainer, n)
        except TypeError:
            return None

    def finish(self) -> None:
        """End the display and write the report; the second time nothing happens."""
        if self.stopped:
            return
        self.stop()
        try:
            self._finish()
        except Exception as error:
            report.note("dashboard", f"there is no report of this training: {type(error).__name__}: {error}")

    def _finish(self) -> None:
        from trl_turbo.dashboard.html import page

        if self._view is not None:
            self._view.finish(self.record)
        if not self.record.rows:
            return
        seconds = plain(round(time.perf_counter() - self._began, 1))
        known = report.current()
        versions = {k: v for k, v in known.versions.items() if v and k in ("trl_turbo", "trl", "torch")}
        self.record.facts.update(seconds=seconds, **versions)
        (self.folder / REPORT).write_text(page(self.record, self.samples(), known.notes))

    def stop(self) -> None:
        """Hear no more, and end the thread that samples memory."""
        self.stopped = True
        if self._memory is not None:
            memory.running.remove(self._memory)
            self._memory.stop()
            self._memory = None


def _view(args: Any) -> Terminal | Notebook | None:
    # Where the progress bars are: who turns them off, or writes into a file, wants no live display either
    if args.disable_tqdm:
        return None
    if in_notebook():
        return Notebook()
    return Terminal() if sys.stderr.isatty() else None
