"""What the LoRA functions take: a frozen base, the adapters over it, and in which dtypes they are multiplied."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch


class Adapter(NamedTuple):
    """Adds dropout(x) @ lora_A.T @ lora_B.T * scaling."""

    lora_A: torch.Tensor  # [r, in]  # noqa: N815 (PEFT's name)
    lora_B: torch.Tensor  # [out, r]  # noqa: N815
    scaling: float
    dropout: float = 0.0  # share of x that is dropped now: 0 in evaluation

    @property
    def rank(self) -> int:
        """Rows of `lora_A`."""
        return self.lora_A.shape[0]


class Base(Protocol):
    """A frozen linear: what it makes of its input, and of a gradient."""

    @property
    def dtype(self) -> torch.dtype:
        """In which it multiplies."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        ...

    @property
    def by_rows(self) -> bool:
        """Whether what it makes of a row does not depend on the others."""
        ...

    def product(self, x: torch.Tensor, *, training: bool) -> torch.Tensor:
        """x [N, in] through the linear with its bias, a new tensor [N, out] that the caller may write to.

        Args:
            x: [N, in].
            training: Whether a backward pass follows.
        """
        ...

    def add_gradient(self, grad: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
        """The gradient of x, [N, in] in `dtype`: `into` (written to) plus grad @ W.

        Args:
            grad: [N, out].
            into: [N, in] in `dtype`, or `None` for a new tensor.
        """
        ...

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What must be the same in backward as it was in forward."""
        ...


@dataclass(frozen=True)
class Projection:
    """One linear with its adapters; adapters may be none.

    Attributes:
        base: The frozen linear.
        adapters: What is added to it.
        compute: In which dtype the adapters multiply; the same for all that share an input.
        result: Dtype of the output.
    """

    base: Base
    adapters: tuple[Adapter, ...]
    compute: torch.dtype
    result: torch.dtype


Projections = tuple[Projection, ...]


def adapters_of(projections: Iterable[Projection]) -> list[Adapter]:
    """All adapters, in order."""
    return [adapter for projection in projections for adapter in projection.adapters]


def versions(projections: Iterable[Projection]) -> tuple[int, ...]:
    """Changes whenever a weight or an adapter is written to in place."""
    found = [tensor._version for p in projections for tensor in p.base.tensors()]
    for adapter in adapters_of(projections):
        found += [adapter.lora_A._version, adapter.lora_B._version]
    return tuple(found)


def check(x: torch.Tensor, projections: Projections) -> None:
    """Raise `ValueError` where these cannot share the input x [..., in]."""
    if not projections:
        raise ValueError("There is no projection to compute; pass at least one.")
    if len({projection.compute for projection in projections}) > 1:
        dtypes = ", ".join(str(projection.compute) for projection in projections)
        raise ValueError(f"Projections of one input multiply their adapters in one dtype, and these in {dtypes}.")
    for adapter in adapters_of(projections):
        rank, inputs = adapter.lora_A.shape
        if inputs != x.shape[-1] or adapter.lora_B.shape[1] != rank:
            shapes = f"{list(adapter.lora_A.shape)} and {list(adapter.lora_B.shape)}"
            raise ValueError(f"lora_A [r, in] and lora_B [out, r] are {shapes}, which does not fit x {list(x.shape)}.")


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] as [N, D], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y [N, out] in the leading shape of x [..., in]."""
    return y.view(*x.shape[:-1], y.shape[-1])


def plainly(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast: every dtype is said here, and it would change those that PEFT does not."""
    return torch.autocast(device.type, enabled=False)


def check_unchanged(ctx: Any) -> None:
    """Raise `RuntimeError` where a weight is not what it was when `ctx.versions` were taken."""
    if versions(ctx.projections) != ctx.versions:
        raise RuntimeError(
            "A weight of a LoRA layer was changed in place between forward and backward; its gradients would be wrong. "
            "Run backward before the optimizer's step."
        )
