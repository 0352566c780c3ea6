"""Products of small decode batches with weights: gated MLPs' first with the activation in it, and every other one.

Which kernel is faster depends on the weight and on the GPU, so each runs through all layers once before the first graph
is captured, and ours stay where they win.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from trl_turbo.engine.decode_batch import MOST_ROWS, decodes, first_line, runs, unexpected
from trl_turbo.engine.decode_race import Calls, microseconds
from trl_turbo.kernels.skinny import fits, skinny_gated, skinny_linear
from trl_turbo.report import note


class _Gate(NamedTuple):
    name: str
    product: Any  # the merged gate and up projection as the model calls it, which may be a wrapper with an adapter
    activation: Any
    kind: str


class Products:
    """The unquantised linear layers of a model of vLLM's.

    Args:
        model: vLLM's.

    Attributes:
        declined: Why all keep vLLM's kernels, in a sentence; `None` where they do not.
    """

    def __init__(self, model: Any) -> None:
        self._gates: list[_Gate] = []
        self._linears: list[Any] = []
        self._kept: set[str] = set()  # gates whose activation gets something else than the product
        self._faster: dict[tuple[Any, ...], bool] = {}
        self._waiting: tuple[str, torch.Tensor] | None = None
        try:
            self._linears = _linears(model)
            self._gates = _gates(model)
            reason = None if self._linears else "none has an unquantised weight that is whole on this device"
        except (ImportError, AttributeError) as error:
            reason = f"this vLLM's layers are not as expected ({error})"
        self.declined = (
            None if reason is None else f"decode steps run vLLM's linear layers and not our kernels: {reason}"
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, small decode batches run the kernels."""
        gates = {id(_base(gate.product)): gate for gate in self._gates}
        with ExitStack() as stack:
            for linear in self._linears:
                gate = gates.get(id(_base(linear)))
                product = self._plain if gate is None else self._gated(gate)
                stack.enter_context(_multiplies(linear, product))
            for gate in self._gates:
                stack.enter_context(runs(gate.activation, self._pass_on(gate, gate.activation.forward)))
            yield
        self._waiting = None

    # -- in vLLM's place ---------------------------------------------------------------------------------------------

    def _plain(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        if not decodes(x.shape[0]) or not fits(x, weight):
            return None

        def race() -> tuple[Calls, Calls]:
            weights = [_base(each).weight for each in self._linears if _base(each).weight.shape == weight.shape]
            ours = [partial(skinny_linear, x, each, bias) for each in weights]
            return ours, [partial(functional.linear, x, each, bias) for each in weights]

        return skinny_linear(x, weight, bias) if self._wins("linear", x, weight, race) else None

    def _gated(self, gate: _Gate) -> Callable[..., torch.Tensor | None]:
        """Both halves' products, the activation and their product: [M, I] where the model expects [M, 2 * I]."""

        def gated(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
            if self._waiting is not None:  # its activation never came
                self._kept.add(self._waiting[0])
                unexpected(self._waiting[0], "no activation")
                self._waiting = None
            if bias is not None or gate.name in self._kept or _adapter_applies(gate.product):
                return self._plain(x, weight, bias)
            if not decodes(x.shape[0]) or not fits(x, weight):
                return None

            def race() -> tuple[Calls, Calls]:
                weights = [(_base(each.product).weight, each) for each in self._gates]
                weights = [(each, of) for each, of in weights if fits(x, each)]
                ours = [partial(skinny_gated, x, each, of.kind) for each, of in weights]
                return ours, [partial(_then, of.activation, x, each) for each, of in weights]

            if not self._wins(gate.kind, x, weight, race):
                return self._plain(x, weight, bias)
            out = skinny_gated(x, weight, gate.kind)
            self._waiting = gate.name, out
            return out

        return gated

    def _pass_on(self, gate: _Gate, forward: Callable[..., Any]) -> Callable[..., Any]:
        def pass_on(x: torch.Tensor) -> Any:
            waiting, self._waiting = self._waiting, None
            if waiting is None:
                return forward(x)
            name, out = waiting
            if name == gate.name and out.data_ptr() == x.data_ptr() and out.shape == x.shape:
                return x
            self._kept.add(name)
            unexpected(name, "something else for its activation than its first product")
            return forward(torch.cat((x, x), dim=-1))  # of the shape that comes next time

        return pass_on

    def _wins(
        self, kernel: str, x: torch.Tensor, weight: torch.Tensor, race: Callable[[], tuple[Calls, Calls]]
    ) -> bool:
        """Whether ours are faster through all layers of a shape; looked at once, in a warm-up."""
        key = kernel, tuple(weight.shape), 8 if len(x) <= 8 else MOST_ROWS  # as the kernels' tiles are
        if key not in self._faster:
            self._faster[key] = True
            if x.is_cuda:
                reason = _slower(*race())
                self._faster[key] = reason is None
                if reason is not None:
                    shape = " x ".join(map(str, weight.shape))
                    what = f"decode steps of up to {key[-1]} sequences run vLLM's kernels for weights of {shape}"
                    note("rollout", f"{what}: {reason}")
        return self._faster[key]


def _slower(ours: Calls, theirs: Calls) -> str | None:
    """Say why ours do not run, or return `None`."""
    try:
        mine = microseconds(ours)
    except Exception as error:  # whatever a compiler or a driver says
        return f"ours do not run on this device ({first_line(error)})"
    other = microseconds(theirs)
    return None if mine < other else f"they take {other:.1f} us here, ours {mine:.1f}"


def _then(activation: Any, x: torch.Tensor, weight: torch.Tensor) -> Any:
    return type(activation).forward_cuda(activation, functional.linear(x, weight))


# -- what a model has -------------------------------------------------------------------------------------------------


def _linears(model: Any) -> list[Any]:
    """Layers that multiply by one unquantised weight that is all on this device, as the model calls them."""
    from vllm.model_executor.layers.linear import LinearBase

    found: dict[int, Any] = {}
    for module in model.modules():  # a wrapper comes before what it wraps
        base = _base(module)
        if isinstance(base, LinearBase) and _whole(base):
            found.setdefault(id(base), module)
    return list(found.values())


def _gates(model: Any) -> list[_Gate]:
    """Of modules of a merged gate and up, an activation that multiplies its halves, and a down projection."""
    from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    found = []
    for name, parent in model.named_modules():
        children = list(parent.children())
        first = [c for c in children if isinstance(_base(c), MergedColumnParallelLinear) and _whole(_base(c))]
        second = [c for c in children if isinstance(_base(c), RowParallelLinear)]
        acts = [c for c in children if type(c) in (SiluAndMul, GeluAndMul)]
        if len(children) != 3 or not (len(first) == len(second) == len(acts) == 1):
            continue
        if len(_base(first[0]).output_sizes) != 2:
            continue
        kind = "silu"
        if type(acts[0]) is GeluAndMul:
            kind = "gelu_tanh" if acts[0].approximate == "tanh" else "gelu"
        found.append(_Gate(name, first[0], acts[0], kind))
    return found


def _base(linear: Any) -> Any:
    """The layer under an adapter's wrapper."""
    return getattr(linear, "base_layer", linear)


def _whole(base: Any) -> bool:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    weight = getattr(base, "weight", None)
    return type(base.quant_method) is UnquantizedLinearMethod and base.tp_size == 1 and weight is not None


def _adapter_applies(linear: Any) -> bool:
    """Whether a wrapper adds an adapter's product, to both halves, before the activation."""
    punica = getattr(linear, "punica_wrapper", None)
    if punica is None:
        return linear is not _base(linear)
    flag = getattr(getattr(punica, "token_mapping_meta", None), "no_lora_flag_cpu", None)
    return flag is None or not bool(flag.item())


@contextmanager
def _multiplies(linear: Any, product: Callable[..., torch.Tensor | None]) -> Iterator[None]:
    """While open, a layer's product with its weight is `product`'s, where that does not return `None`."""
    base = _base(linear)
    method = base.quant_method
    base.quant_method = _Product(method, product)
    try:
        yield
    finally:
        base.quant_method = method


class _Product:
    """In everything but the product the layer's own method."""

    def __init__(self, method: Any, product: Callable[..., torch.Tensor | None]) -> None:
        self._method = method
        self._product = product

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        out = self._product(x, layer.weight, bias) if x.dim() == 2 else None
        return self._method.apply(layer, x, bias) if out is None else out
