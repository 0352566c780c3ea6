"""Frozen linears: dense, and those of bitsandbytes in 4 and 8 bits. None keeps a dequantised weight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

from trl_turbo.kernels.dequantise import Dequantiser

from .scratch import buffer
from .spec import to


def _add(grad: torch.Tensor, weight: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(grad, weight) if into is None else into.addmm_(grad, weight)


@dataclass(frozen=True, eq=False)
class Dense:
    """A linear in a floating dtype.

    Attributes:
        weight: [out, in], of any floating dtype; cast for each product where it is not of `dtype`.
        bias: [out] or `None`.
        dtype: In which it multiplies.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    by_rows: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        """See `Base`."""
        outputs, inputs = self.weight.shape
        return outputs, inputs

    def product(self, x: torch.Tensor, *, training: bool) -> torch.Tensor:  # noqa: ARG002
        """See `Base`."""
        bias = None if self.bias is None else to(self.bias, self.dtype)
        return functional.linear(to(x, self.dtype), to(self.weight, self.dtype), bias)

    def add_gradient(self, grad: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
        """See `Base`."""
        return _add(to(grad, self.dtype), to(self.weight, self.dtype), into)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """See `Base`."""
        return (self.weight,)


@dataclass(frozen=True, eq=False)
class FourBit:
    """A linear of bitsandbytes in 4 bits, nf4 or fp4, its scales quantised again or not.

    Attributes:
        weight: [out * in / 2, 1], packed.
        state: Its `QuantState`.
        bias: [out] or `None`.
        dtype: In which it multiplies: the compute dtype.
        result: Dtype of the product: bitsandbytes gives back that of its input.
    """

    weight: torch.Tensor
    state: Any
    bias: torch.Tensor | None
    dtype: torch.dtype
    result: torch.dtype
    by_rows: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        """See `Base`."""
        outputs, inputs = self.state.shape
        return outputs, inputs

    def product(self, x: torch.Tensor, *, training: bool) -> torch.Tensor:
        """See `Base`."""
        x = to(x, self.dtype)
        bias = None if self.bias is None else to(self.bias, self.dtype)
        if not training:  # bitsandbytes has kernels for few rows, which do not dequantise
            from bitsandbytes import matmul_4bit

            with torch.no_grad():
                return matmul_4bit(x, self.weight, quant_state=self.state, bias=bias).to(self.result)
        with buffer(tuple(self.state.shape), self.state.dtype, self.weight.device) as out:
            return to(functional.linear(x, self._dequantised(out), bias), self.result)

    def add_gradient(self, grad: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
        """See `Base`."""
        with buffer(tuple(self.state.shape), self.state.dtype, self.weight.device) as out:
            return _add(to(grad, self.dtype), self._dequantised(out), into)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """See `Base`."""
        return (self.weight,)

    @functools.cached_property
    def _dequantise(self) -> Dequantiser:
        return Dequantiser(self.weight, self.state)

    def _dequantised(self, out: torch.Tensor) -> torch.Tensor:
        return to(self._dequantise(out), self.dtype)


@dataclass(frozen=True, eq=False)
class EightBit:
    """A linear of bitsandbytes in 8 bits (LLM.int8), whose weight is kept in 8 bits alone.

    Its own forward makes the product: outliers of x are multiplied apart, and the layer's state moves with it. For the
    gradient of x bitsandbytes dequantises all of the weight, and so does this.

    Attributes:
        forward: The layer's forward.
        state: Its `MatmulLtState`, which has the weight `CB` [out, in] and the scales `SCB` [out] after a forward.
        dtype: Of x, and so of the product.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    state: Any
    dtype: torch.dtype
    #: Which columns are outliers is settled over all rows.
    by_rows: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        """See `Base`; only the layer knows before its first forward."""
        outputs, inputs = self.forward.__self__.weight.shape  # type: ignore[attr-defined]
        return outputs, inputs

    def product(self, x: torch.Tensor, *, training: bool) -> torch.Tensor:  # noqa: ARG002
        """See `Base`."""
        with torch.no_grad():
            return self.forward(x).to(self.dtype)

    def add_gradient(self, grad: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
        """See `Base`."""
        weight, scales = self.state.CB, self.state.SCB
        with buffer(tuple(weight.shape), self.dtype, weight.device) as out:
            out.copy_(weight).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))  # the order of bitsandbytes
            return _add(to(grad, self.dtype), out, into)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """See `Base`."""
        return ()
