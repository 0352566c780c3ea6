"""Which part of an adapter a rank of vLLM's tensor parallel group multiplies by.

vLLM's own LoRA layers say it: they are asked to cut tensors that hold positions, once, and what comes back is the
positions that this rank keeps. So heads that are replicated and layers that are fused need no rule here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """The positions along one dimension that a rank keeps.

    Attributes:
        dim: Dimension of the whole tensor.
        kept: Positions, [K], on the CPU; `None` where all are kept.
        size: K.
    """

    dim: int
    kept: Tensor | None
    size: int

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a whole tensor; a view where the positions follow one another."""
        if self.kept is None:
            return tensor
        first = int(self.kept[0])
        if torch.equal(self.kept, torch.arange(first, first + self.size)):
            return tensor.narrow(self.dim, first, self.size)
        return tensor.index_select(self.dim, self.kept.to(tensor.device))


def cuts(module: Any, index: int, parts: int, inputs: int, outputs: int) -> tuple[Cut, Cut]:
    """Which columns of A, [r, in], and which rows of B, [out, r], this rank keeps.

    Args:
        module: A LoRA layer of vLLM's.
        index: Which of the linears it stands for.
        parts: How many linears it stands for.
        inputs: in, of the whole linear.
        outputs: out, of the whole linear.
    """
    if getattr(module, "tp_size", None) is None:
        size = module.base_layer.tp_size  # older ones ask their base layer
    else:
        size = module.tp_size
    if size == 1:
        return Cut(1, None, inputs), Cut(0, None, outputs)
    columns, rows = torch.arange(inputs)[None], torch.arange(outputs)[:, None]
    if parts > 1:
        columns = module.slice_lora_a([columns if i == index else None for i in range(parts)])[index]
        rows = module.slice_lora_b([rows if i == index else None for i in range(parts)])[index]
    else:
        columns, rows = module.slice_lora_a(columns), module.slice_lora_b(rows)
    return _cut(1, columns[0], inputs), _cut(0, rows[:, 0], outputs)


def _cut(dim: int, kept: Tensor, whole: int) -> Cut:
    return Cut(dim, None if len(kept) == whole else kept, len(kept))
