"""What CUDA graphs of small decode batches capture: our kernels where several of vLLM's would run.

With few sequences a decode step reads each weight once and computes next to nothing, so that what counts is how well it
reads, and how often the GPU starts anew: 13 kernels a layer, of which a 1.5B model has 28, took 2.0 ms for 8 sequences
on an H200. While vLLM captures its graphs, and only then, layers of its model hand over to `trl_turbo.kernels`;
afterwards each module is as it was, and prefills and larger batches never knew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl_turbo.engine.decode_attention import Attention
from trl_turbo.engine.decode_products import Products


class DecodeKernels:
    """Our kernels in the graphs of a model of vLLM's.

    Args:
        model: vLLM's.
        length: Tokens that a sequence has on average while it is sampled.

    Attributes:
        declined: What keeps vLLM's kernels, and why, in sentences.
    """

    def __init__(self, model: Any, length: int) -> None:
        self.attention = Attention(model, length)
        self.products = Products(model)
        self.declined = tuple(filter(None, (self.attention.declined, self.products.declined)))

    @property
    def own_attention(self) -> set[int]:
        """Sizes of batches whose graph has no attention of vLLM's: what that needs is not prepared for them."""
        return self.attention.sizes

    @contextmanager
    def captured(self) -> Iterator[None]:
        """While open, the model's layers run our kernels where a batch of few sequences decodes."""
        with self.attention.in_place(), self.products.in_place():
            yield
