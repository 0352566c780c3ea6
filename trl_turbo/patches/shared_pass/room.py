"""How many micro-batches may wait for backward at once without a training's peak of memory growing.

A rollout has its KV cache in memory; training has that memory free, and a micro-batch's graph and work in it. What is
left of it holds graphs of further micro-batches. Both are measured: what a graph keeps as it is made, and what torch
takes for training with one graph, in graphs, so that it follows the lengths of later rollouts. Before the KV cache
comes back torch gives up what it does not use, so that what it has after a backward is that training's peak, and no
counter of the script's own is reset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trl_turbo.patches.rollout.release import shared_llm


@dataclass
class Room:
    """What one trainer's graphs take.

    Attributes:
        before: Bytes that torch had in use as this rollout was about to be scored.
        graph: Bytes that its first micro-batch's graph keeps, 0 while it has not been made.
        free: Bytes that the KV cache has given up for this rollout's training.
        is_clean: Whether torch had given up what it did not use before this rollout.
        taken: The most that torch was seen to have since then.
        peak: The most that training with one graph takes beside `before`, in graphs; 0.0 while not known.
    """

    before: int = 0
    graph: int = 0
    free: int = 0
    is_clean: bool = False
    taken: int = 0
    peak: float = 0.0

    @property
    def is_measuring(self) -> bool:
        """Whether it is still being seen what a training takes."""
        return self.free > 0 and not self.peak

    def begin(self, trainer: Any, device: torch.device) -> None:
        """A rollout begins, and what was trained on before has ended."""
        if device.type != "cuda":
            return
        self.watch(device)
        if self.is_clean and self.graph and not self.peak:
            self.peak = (self.taken - self.before) / self.graph
        self.is_clean = released_bytes(trainer) > 0

    def open(self, device: torch.device) -> None:
        """Note what is in use before a rollout is scored."""
        if device.type == "cuda":
            self.before, self.taken = torch.cuda.memory_allocated(device), 0

    def watch(self, device: torch.device) -> None:
        """Look at what torch has, before each micro-batch: by the end an evaluation may have made it give that up."""
        if device.type == "cuda":
            self.taken = max(self.taken, torch.cuda.memory_reserved(device))

    def further(self, trainer: Any, device: torch.device) -> int:
        """How many graphs may be there beside the first, which has just been made."""
        if device.type != "cuda":
            return 0
        self.graph = max(1, torch.cuda.memory_allocated(device) - self.before)
        self.free = released_bytes(trainer)
        return fitting(self.free, self.graph, self.peak)


def fitting(free: int, graph: int, peak: float) -> int:
    """How many further graphs fit beside a training's peak.

    Args:
        free: Bytes that a rollout has and training has not.
        graph: Bytes of one graph.
        peak: Of a training with one graph, in graphs; 0.0 if not known, when none fits.
    """
    return max(0, int(free / graph - peak)) if peak else 0


def released_bytes(trainer: Any) -> int:
    """Bytes of the KV cache that a trainer's engine has given up until the next rollout."""
    llm = shared_llm(getattr(trainer, "vllm_generation", trainer))
    return llm.shared.released_bytes if llm is not None else 0
