"""Gated MLPs of small decode batches: the first product with the activation in it, and the second with its sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from trl_turbo.engine.decode_batch import MOST_ROWS, decodes, runs, unexpected
from trl_turbo.engine.decode_race import microseconds
from trl_turbo.kernels.skinny import fits, skinny_gated, skinny_linear
from trl_turbo.report import note


class _MLP(NamedTuple):
    name: str
    gate_up: Any  # each as the model calls it, which may be a wrapper with an adapter
    activation: Any
    down: Any
    kind: str


class GatedMLPs:
    """The gated MLPs of a model of vLLM's.

    Args:
        model: vLLM's.

    Attributes:
        declined: Why all keep vLLM's kernels, in a sentence; `None` where they do not.
    """

    def __init__(self, model: Any) -> None:
        self._mlps: list[_MLP] = []
        self._kept: set[str] = set()  # whose activation gets something else than the product
        self._faster: dict[tuple[str, int], bool] = {}  # a kernel, for so many rows or a tile of them
        self._waiting: tuple[str, torch.Tensor] | None = None
        try:
            self._mlps = _found(model)
            reason = None if self._mlps else "none has unquantised weights that are whole on this device"
        except (ImportError, AttributeError) as error:
            reason = f"this vLLM's layers are not as expected ({error})"
        self.declined = None if reason is None else f"decode steps run vLLM's gated MLPs and not our kernels: {reason}"

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, small decode batches run the kernels."""
        with ExitStack() as stack:
            for mlp in self._mlps:
                stack.enter_context(_multiplies(mlp.gate_up, self._first(mlp)))
                stack.enter_context(runs(mlp.activation, self._pass_on(mlp, mlp.activation.forward)))
                stack.enter_context(_multiplies(mlp.down, self._second))
            yield
        self._waiting = None

    def _first(self, mlp: _MLP) -> Callable[..., torch.Tensor | None]:
        """Both halves' products, the activation and their product: [M, I] where the model expects [M, 2 * I]."""

        def first(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
            if self._waiting is not None:  # its activation never came
                self._kept.add(self._waiting[0])
                unexpected(self._waiting[0], "no activation")
                self._waiting = None
            if bias is not None or mlp.name in self._kept or _adapter_applies(mlp.gate_up):
                return None
            if not decodes(x.shape[0]) or not fits(x, weight):
                return None
            if not self._wins("gated", x):
                return None
            out = skinny_gated(x, weight, mlp.kind)
            self._waiting = mlp.name, out
            return out

        return first

    def _pass_on(self, mlp: _MLP, forward: Callable[..., Any]) -> Callable[..., Any]:
        def pass_on(x: torch.Tensor) -> Any:
            waiting, self._waiting = self._waiting, None
            if waiting is None:
                return forward(x)
            name, out = waiting
            if name == mlp.name and out.data_ptr() == x.data_ptr() and out.shape == x.shape:
                return x
            self._kept.add(name)
            unexpected(name, "something else for its activation than its first product")
            return forward(torch.cat((x, x), dim=-1))  # of the shape that comes next time

        return pass_on

    def _second(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        if not decodes(x.shape[0]) or not fits(x, weight) or not self._wins("linear", x):
            return None
        return skinny_linear(x, weight, bias)

    def _wins(self, kernel: str, x: torch.Tensor) -> bool:
        """Whether a kernel is faster through all layers than what vLLM launches; looked at once, in a warm-up."""
        key = kernel, 8 if len(x) <= 8 else MOST_ROWS  # as the kernels' tiles are
        if key not in self._faster:
            self._faster[key] = not x.is_cuda or self._race(kernel, x)
        return self._faster[key]

    def _race(self, kernel: str, x: torch.Tensor) -> bool:
        ours: list[Callable[[], Any]] = []
        theirs: list[Callable[[], Any]] = []
        for mlp in self._mlps:
            weight = _base(mlp.gate_up if kernel == "gated" else mlp.down).weight
            if not fits(x, weight):
                continue
            if kernel == "gated":
                ours.append(partial(skinny_gated, x, weight, mlp.kind))
                theirs.append(partial(_then, type(mlp.activation).forward_cuda, mlp.activation, x, weight))
            else:
                ours.append(partial(skinny_linear, x, weight))
                theirs.append(partial(functional.linear, x, weight))
        mine, other = microseconds(ours), microseconds(theirs)
        if mine >= other:
            what = "gate and up projections" if kernel == "gated" else "down projections"
            note(
                "rollout",
                f"{what} of {len(x)} rows run vLLM's kernels, which take {other:.1f} us here; ours {mine:.1f}",
            )
        return mine < other


def _then(activation: Callable[..., Any], module: Any, x: torch.Tensor, weight: torch.Tensor) -> Any:
    return activation(module, functional.linear(x, weight))


def _found(model: Any) -> list[_MLP]:
    """Modules of a merged gate and up, an activation that multiplies its halves, and a down projection."""
    from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    found = []
    for name, parent in model.named_modules():
        children = list(parent.children())
        first = [c for c in children if isinstance(_base(c), MergedColumnParallelLinear) and _whole(c)]
        second = [c for c in children if isinstance(_base(c), RowParallelLinear) and _whole(c)]
        acts = [c for c in children if type(c) in (SiluAndMul, GeluAndMul)]
        if len(children) != 3 or not (len(first) == len(second) == len(acts) == 1):
            continue
        if len(_base(first[0]).output_sizes) != 2:
            continue
        kind = "silu"
        if type(acts[0]) is GeluAndMul:
            kind = "gelu_tanh" if acts[0].approximate == "tanh" else "gelu"
        found.append(_MLP(name, first[0], acts[0], second[0], kind))
    return found


def _base(linear: Any) -> Any:
    """The layer under an adapter's wrapper."""
    return getattr(linear, "base_layer", linear)


def _whole(linear: Any) -> bool:
    """Whether a layer multiplies by one unquantised weight that is all on this device."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    base = _base(linear)
    return type(base.quant_method) is UnquantizedLinearMethod and base.tp_size == 1 and base.weight.dim() == 2


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
