"""Peak memory by phase of a step, seen from outside: nobody's peak statistics are reset.

Whoever measures `torch.cuda.max_memory_allocated()` around a training must find what he would have found without us, so
a thread samples what is allocated, and where a phase raised the process's peak, that peak is exact.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

#: Seconds between samples. One takes torch some tenths of a millisecond, which the training's thread waits for.
PERIOD_S = 0.05
#: A part of what TRL calls a piece of its work -> the phase that it is. What is named otherwise stays in the phase it
#: is in: a reward function, for one, is called what its author called it.
PHASES = (
    ("generate", "sampling"),
    ("sync_weights", "sampling"),
    ("_calculate_rewards", "rewards"),
    ("logps", "scoring"),
    ("compute_loss", "loss"),
)
TRAINING, OPTIMIZER = "training", "optimizer"


def phase_of(name: str) -> str | None:
    """Return the phase that TRL's name of a piece of work belongs to, or `None`."""
    return next((phase for part, phase in PHASES if part in name), None)


class PhaseMemory:
    """Samples memory, and attributes it to the phase that is running.

    Args:
        read: Returns the bytes that are in use.
        peak: Returns the peak of the process so far; `None` where nothing keeps one.
    """

    def __init__(self, read: Callable[[], int], peak: Callable[[], int] | None = None) -> None:
        self._read, self._peak = read, peak
        self._lock = threading.Lock()
        self._peaks: dict[str, int] = {}
        self._stack = [TRAINING]
        self._highest = peak() if peak is not None else 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to sample."""
        self._thread = threading.Thread(target=self._sample, name="trl_turbo-memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def enter(self, phase: str) -> None:
        """Begin a phase; the one around it goes on when it ends."""
        self._note()
        # The policy's own pass is part of computing its loss
        self._stack.append("loss" if self._stack[-1] == "loss" else phase)

    def leave(self) -> None:
        """End the phase that was begun last."""
        self._note()
        if len(self._stack) > 1:
            self._stack.pop()

    def switch(self, phase: str) -> None:
        """Be in this phase alone."""
        self._note()
        self._stack = [phase]

    def take(self) -> dict[str, int]:
        """Return the peak of each phase since the last call, in bytes."""
        self._note()
        with self._lock:
            taken, self._peaks = self._peaks, {}
        return taken

    def _note(self) -> None:
        size = self._read()
        if self._peak is not None and (highest := self._peak()) > self._highest:
            self._highest = size = highest
        with self._lock:
            phase = self._stack[-1]
            self._peaks[phase] = max(size, self._peaks.get(phase, 0))

    def _sample(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._note()


def reader(device: str) -> PhaseMemory:
    """Return a sampler of what is allocated on a CUDA device, or of what this process holds resident."""
    if device.startswith("cuda"):
        import torch

        return PhaseMemory(lambda: torch.cuda.memory_allocated(device), lambda: torch.cuda.max_memory_allocated(device))
    import psutil

    process = psutil.Process()
    return PhaseMemory(lambda: process.memory_info().rss)


#: The samplers of the trainings that run at the moment; TRL says what it does, and not for whom.
running: list[PhaseMemory] = []
