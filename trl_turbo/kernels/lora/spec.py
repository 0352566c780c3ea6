"""What the LoRA functions take: a frozen base, the adapters over it, and in which dtypes they are multiplied."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

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


@dataclass(frozen=True, eq=False)
class Projection:
    """One linear with its adapters; adapters may be none. Two are equal where they are one object.

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
    _sharing: dict[tuple[Projection, ...], Linears] = field(default_factory=dict, init=False, repr=False)


class Linears:
    """Linears of one input, with what each pass asks about them found out once.

    Attributes:
        projections: The linears.
        adapters: All of theirs, in order.
        ranks: Of the adapters.
        columns: Of `low` and `high` [N, R], those of each adapter.
        rank: R, the sum of the adapters' ranks.
        compute: In which dtype the adapters multiply.
        scaling: That of all adapters, `None` where they have several.
        drops: Whether any adapter drops out.
        one_each: Whether no linear has more than one adapter.
        rounded: Whether the gradients of all adapters end in `compute`.
        plain: Whether they are one linear with one adapter that drops nothing, all in the dtype in which it multiplies.
        parameters: lora_A and lora_B of each adapter in turn.
        stacked: All lora_A, then all lora_B.
        elements: In all of them.
        pack: What adapters must have in common to be cast in one launch, `None` where these are not.
    """

    def __init__(self, projections: tuple[Projection, ...]) -> None:
        if not projections:
            raise ValueError("There is no projection to compute; pass at least one.")
        if len({projection.compute for projection in projections}) > 1:
            dtypes = ", ".join(str(projection.compute) for projection in projections)
            raise ValueError(
                f"Projections of one input multiply their adapters in one dtype, and these do in {dtypes}; pass "
                "projections of one compute dtype."
            )
        self.projections = projections
        self.adapters = tuple(adapter for projection in projections for adapter in projection.adapters)
        self.compute = projections[0].compute
        scalings = {adapter.scaling for adapter in self.adapters}
        self.scaling = scalings.pop() if len(scalings) == 1 else None
        self.drops = any(adapter.dropout for adapter in self.adapters)
        self.parameters = tuple(x for adapter in self.adapters for x in (adapter.lora_A, adapter.lora_B))
        self.stacked = (*self.parameters[::2], *self.parameters[1::2])
        self.elements = sum(x.numel() for x in self.stacked)
        self.pack = _pack(self.stacked, self.compute)
        self.ranks = [adapter.rank for adapter in self.adapters]
        ends = list(itertools.accumulate(self.ranks))
        self.columns = tuple(slice(*ends) for ends in zip([0, *ends[:-1]], ends, strict=True)) if ends else ()
        self.rank = ends[-1] if ends else 0
        self.one_each = all(len(projection.adapters) <= 1 for projection in projections)
        self.rounded = all(x.dtype == self.compute for x in self.parameters)
        self.plain = len(projections) == len(self.adapters) == 1 and not self.drops and _in_one_dtype(*projections)
        self._versioned = (*(x for p in projections for x in p.base.tensors()), *self.parameters)

    def check(self, x: torch.Tensor) -> None:
        """Raise `ValueError` where an adapter does not fit x [..., in]."""
        for adapter in self.adapters:
            rank, inputs = adapter.lora_A.shape
            if inputs != x.shape[-1] or adapter.lora_B.shape[1] != rank:
                shapes = f"{list(adapter.lora_A.shape)} and {list(adapter.lora_B.shape)}"
                raise ValueError(
                    f"lora_A [r, in] and lora_B [out, r] are {shapes}, which does not fit x {list(x.shape)}; pass "
                    "adapters of one r whose in is the last size of x."
                )

    def versions(self) -> list[int]:
        """Changes whenever a weight or an adapter is written to in place."""
        return [x._version for x in self._versioned]

    def have_gradient(self) -> bool:
        """Whether an adapter is trained."""
        return any(x.requires_grad for x in self.parameters)


# Where torch's memory for a tensor of its own begins, in bytes: products must find in a buffer what they find there
_BEGINS = 512


def _pack(adapters: tuple[torch.Tensor, ...], compute: torch.dtype) -> tuple[torch.dtype, ...] | None:
    dtypes = {x.dtype for x in adapters}
    if len(dtypes) != 1 or compute in dtypes or len({x.device for x in adapters}) > 1:
        return None
    if any(type(x) not in (torch.Tensor, torch.nn.Parameter) for x in adapters):
        return None
    begin = all(x.numel() * compute.itemsize % _BEGINS == 0 for x in adapters)
    return (*dtypes, compute) if begin else None


def _in_one_dtype(projection: Projection) -> bool:
    return projection.compute == projection.result == projection.base.dtype


def together(*projections: Projection) -> Linears:
    """These as the linears of one input; kept with the first of them, and as long.

    Raises:
        ValueError: They are none, or their adapters multiply in several dtypes.
    """
    if not projections:
        return Linears(projections)
    known = projections[0]._sharing
    found = known.get(projections[1:])
    if found is None:
        found = known[projections[1:]] = Linears(projections)
    return found


def to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in a dtype; where it is in it already, torch's own `to` takes the host longer than asking does.

    `type` does what `to` does, which has more forms of a call to tell apart: 1.5 us of the host instead of 2.3.
    """
    return x if x.dtype == dtype else x.type(dtype)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] as [N, D], contiguous."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.is_contiguous() else x.contiguous()


def shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y [N, out] in the leading shape of x [..., in]."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


class plainly:  # noqa: N801 (a context manager)
    """Without autocast: every dtype is said here, and it would change those that PEFT does not."""

    def __init__(self, device: torch.device) -> None:
        self._kind = device.type
        self._on = torch.is_autocast_enabled(device.type)

    def __enter__(self) -> None:
        if self._on:
            torch.set_autocast_enabled(self._kind, False)

    def __exit__(self, *_: object) -> None:
        if self._on:
            torch.set_autocast_enabled(self._kind, True)


def check_unchanged(linears: Linears, then: list[int]) -> None:
    """Raise `RuntimeError` where a weight is not what it was when these `versions` were taken."""
    if linears.versions() != then:
        raise RuntimeError(
            "A weight of a LoRA layer was changed in place between forward and backward, whose gradients would be "
            "wrong; run backward before the optimizer's step."
        )
