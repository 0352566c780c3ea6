"""Memory that outlives a launch: partial sums, and counters of who has arrived."""

from __future__ import annotations

import functools

import torch

from .tiles import MOST_ROWS


class Workspace:
    """Scratch of `skinny_linear`, made once for a shape and kept as long as this object.

    A captured CUDA graph goes on writing into it: it must live as long as the graph. Launches that share one must be
    ordered on one stream (or by events), as each leaves its counters at zero for the next.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[torch.device, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, device: torch.device, n: int, split: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial sums [split, N, 16], float32, not initialised, and counters [N], int32, at zero between launches.

        Raises:
            RuntimeError: They would have to be allocated while a CUDA graph is captured.
        """
        key = (device, n, split)
        found = self._made.get(key)
        if found is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"skinny_linear has no scratch yet for {n} outputs in {split} parts, and a CUDA graph is being "
                    "captured; call it once with these shapes before"
                )
            partial = torch.empty(split, n, MOST_ROWS, dtype=torch.float32, device=device)
            found = self._made[key] = partial, torch.zeros(n, dtype=torch.int32, device=device)
        return found


@functools.cache
def shared() -> Workspace:
    """The one that calls without a workspace of their own use, for the life of the process."""
    return Workspace()
