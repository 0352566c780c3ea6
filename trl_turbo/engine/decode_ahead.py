"""Which weights the small kernels of a decode step bring into the L2 for those behind them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch

#: Bytes that are asked for beside the attention of a layer, and beside a product.
BESIDE_ATTENTION, BESIDE_PRODUCT = 12 << 20, 8 << 20
#: The share of the L2 that may hold what nobody has read yet.
MOST_OF_L2 = 0.4


class Ahead:
    """The weights of a step in the order in which it reads them, and up to where they were asked for.

    A wrong order costs bandwidth and changes no result.

    Args:
        weights: In that order; those that are not dense in memory are left out.
        most: Bytes that may be asked for and not yet be read; 0 for none at all.
    """

    def __init__(self, weights: Sequence[torch.Tensor], most: int) -> None:
        self._weights = [weight for weight in weights if weight.is_contiguous()]
        self._ends = list(accumulate(weight.nbytes for weight in self._weights))
        self._index = {id(weight): i for i, weight in enumerate(self._weights)}
        self._most = most
        self._read = self._asked = 0

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor]) -> Ahead:
        """As much ahead as the L2 of the weights' device allows."""
        device = weights[0].device if weights else None
        if device is None or device.type != "cuda":
            return cls(weights, 0)
        return cls(weights, int(MOST_OF_L2 * torch.cuda.get_device_properties(device).L2_cache_size))

    def reads(self, weight: torch.Tensor) -> None:
        """The next kernel reads this weight."""
        index = self._index.get(id(weight))
        if index is None:
            return
        before = self._read
        self._read = self._ends[index]
        self._asked = self._read if self._read <= before else max(self._asked, self._read)

    def take(self, most: int) -> torch.Tensor | None:
        """What a kernel brings in: up to so many bytes that follow, one-dimensional, or nothing."""
        end = min(self._asked + most, self._read + self._most)
        index = bisect_right(self._ends, self._asked)
        if end <= self._asked or index == len(self._ends):
            return None
        weight = self._weights[index]
        start = self._ends[index] - weight.nbytes
        first, end = self._asked - start, min(end, self._ends[index]) - start
        self._asked = start + end
        size = weight.element_size()
        return weight.detach().view(-1)[first // size : end // size]
