"""What `fold` takes and answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch

#: Weights that are folded.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class LoraLayer(NamedTuple):
    """One linear with its adapter: the weight becomes weight + (lora_B * scaling) @ lora_A."""

    weight: torch.Tensor  # [out, in]
    lora_A: torch.Tensor  # [r, in]  # noqa: N815 (PEFT's name)
    lora_B: torch.Tensor  # [out, r]  # noqa: N815
    scaling: float


class Folded(Protocol):
    """Weights that have their adapter in them.

    Attributes:
        log_bytes: What the elements that rounding does not bring back take, with their places.
    """

    log_bytes: int

    def restore(self) -> int:
        """Make the weights what they were; return how many pieces (or tiles) of them are not, to the bit.

        The adapters must be what they were in :func:`fold`. Call it once.
        """
        ...


class LogTooLargeError(RuntimeError):
    """So many elements do not round-trip that remembering them costs too much memory; the base is as it was."""


def check_share(log_bytes: int, weights: Iterable[torch.Tensor], log_share: float) -> None:
    """Raise `LogTooLargeError` where a log takes more than this share of the weights' [out, in] bytes."""
    total_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    if log_bytes > log_share * total_bytes:
        raise LogTooLargeError(
            f"remembering what rounding loses takes {log_bytes / total_bytes:.0%} of the folded weights' memory, and "
            f"{log_share:.0%} is allowed"
        )
