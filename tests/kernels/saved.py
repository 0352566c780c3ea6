"""What autograd keeps for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes of the storages that `forward` saves for its backward, each counted once."""
    storages: dict[int, int] = {}
    held = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        held.append(x)  # an address must not be given to another
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held.append(forward())
    return sum(storages.values())
