"""What a PEFT LoRA layer computes in its present state, as a `Projection`, or why that is left to PEFT.

The dtypes are PEFT's (peft/tuners/lora/layer.py and bnb.py, 0.17 to 0.21). Over a dense base the sum is rounded to the
base's dtype. Over bitsandbytes the base answers in the dtype of its input, and PEFT casts to the adapter's dtype and
back unless `torch.is_autocast_enabled()`, which asks about CUDA alone.
"""

from __future__ import annotations

import functools
import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trl_turbo.compat.sharded import is_sharded, is_zero3
from trl_turbo.kernels.lora import Adapter, Base, Dense, EightBit, FourBit, Projection


class Left(Exception):  # noqa: N818 (not an error)
    """The layer runs PEFT's own forward; says why, or nothing where PEFT's forward is all there is to do."""


_any_module_hooked = nn.modules.module._has_any_global_hook
# What was found for a layer in a state of it; some are few, and a state that does not come again is not kept for long
_known: WeakKeyDictionary[nn.Module, dict[Any, Projection]] = WeakKeyDictionary()
_MOST_STATES = 8

#: What a layer is called in: dtype and device of its input, autocast, and whether all modules have hooks.
Surroundings = tuple[torch.dtype, torch.device, bool, bool, torch.dtype, bool]


def surroundings(x_dtype: torch.dtype, device: torch.device) -> Surroundings:
    """What `projection` asks that is no layer's own; asked once for all the layers of one input."""
    kind = device.type
    autocast, of_cuda = torch.is_autocast_enabled(kind), torch.is_autocast_enabled()
    return x_dtype, device, autocast, of_cuda, torch.get_autocast_dtype(kind), bool(_any_module_hooked())


def projection(
    layer: Any, x_dtype: torch.dtype, device: torch.device, around: Surroundings | None = None
) -> Projection:
    """What `layer` computes of an x [..., in] of a dtype on a device, with autocast as it is now.

    The same object as long as the layer is in the same state.

    Args:
        layer: A LoRA layer of PEFT's, or a frozen linear without one.
        x_dtype: Dtype of x.
        device: Of x.
        around: The `surroundings` of this dtype and device as they are now, where the caller has them.

    Raises:
        Left: It runs its own forward.
    """
    state = around or surroundings(x_dtype, device), _state(layer)
    known = _known.get(layer)
    if known is None:
        known = _known[layer] = {}
    found = known.get(state)
    if found is None:
        if len(known) >= _MOST_STATES:
            known.clear()
        found = known[state] = _projection(layer, x_dtype, device)
    return found


def _state(layer: Any) -> tuple[Any, ...]:
    """All that `_projection` asks of a layer and that may be another at the next call.

    Read without nn.Module.__getattr__ and PEFT's properties, in the fewest steps: each pass asks it of each layer.
    Weights go in by identity, which their `Projection` keeps from being given to others.
    """
    own = layer.__dict__
    modules = own["_modules"]
    adapters = modules.get("lora_A")
    if adapters is None:
        return _state_of(layer)
    adapters, drops, others = adapters._modules, modules["lora_dropout"]._modules, modules["lora_B"]._modules
    variants, dora, scaling = own.get("lora_variant"), own.get("use_dora"), own["scaling"]
    if variants is None:
        variants = modules.get("lora_variant") or ()
    of_adapters = []
    for name in layer.active_adapters:
        a = adapters.get(name)
        if a is None:
            continue
        dropout = drops[name]
        kept = dropout.__dict__
        of_adapters.append(
            (
                name,
                scaling[name],
                name in variants,
                dora is not None and dora.get(name),
                type(dropout),
                kept["training"],
                kept.get("p"),
                _hooked(kept),
                _state_of(a),
                _state_of(others[name]),
            )
        )
    return (
        layer.disable_adapters,
        bool(layer.merged_adapters),
        own.get("cast_input_dtype_enabled", True),
        *of_adapters,
        _state_of(modules["base_layer"]),
    )


def _state_of(linear: Any) -> tuple[Any, ...]:
    """The same of a linear, with or without bitsandbytes."""
    own, kind = linear.__dict__, type(linear)
    parameters = own["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None:  # a plain attribute under FSDP and DataParallel; some layers have none
        weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
        if not isinstance(weight, torch.Tensor):
            return (kind,)
    kept = weight.__dict__
    state = (
        kind,
        id(weight),
        weight.dtype,
        weight.device,
        weight.requires_grad,
        type(weight),
        len(kept),  # marks of FSDP and ZeRO-3
        id(bias),
        bias is not None and bias.requires_grad,
        _hooked(own),
    )
    if kind is nn.Linear and not kept:
        return state
    return (*state, id(kept.get("quant_state")), id(own.get("state")), id(own.get("compute_dtype")))


def _projection(layer: Any, x_dtype: torch.dtype, device: torch.device) -> Projection:
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    if torch.float64 in (x_dtype, autocast) and autocast is not None:
        raise Left("float64 under autocast runs PEFT's own forward")
    if not hasattr(layer, "lora_A"):
        base, result = _base(layer, x_dtype, device, autocast)
        return Projection(base, (), result, result)
    if layer.disable_adapters or layer.merged:
        raise Left  # there is nothing but the base, and PEFT may have to unmerge it
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        raise Left
    base, result = _base(layer.base_layer, x_dtype, device, autocast)
    adapters = tuple(_adapter(layer, name, device) for name in names)
    dtypes = {tensor.dtype for adapter in adapters for tensor in adapter[:2]}
    if len(dtypes) > 1:
        raise Left("adapters of several dtypes on one layer run PEFT's own forward")
    (own,) = dtypes
    casts = isinstance(base, Dense) or not torch.is_autocast_enabled()
    if own != x_dtype and not (casts and getattr(layer, "cast_input_dtype_enabled", True)) and autocast is None:
        raise Left("an input that PEFT does not cast to the adapter's dtype is left to PEFT")
    compute = own if autocast is None else autocast
    if not casts and torch.promote_types(result, compute) != result:
        raise Left(f"a quantised base that answers in {result} under autocast in {compute} runs PEFT's own forward")
    return Projection(base, adapters, compute, result)


def hooked(*modules: nn.Module) -> bool:
    """Whether calling these runs more than the forward of their class."""
    return bool(_any_module_hooked()) or any(_hooked(module.__dict__) for module in modules)


def _hooked(own: dict[str, Any]) -> bool:
    """The same of what is in one module; asked in each pass, so without a look-up through nn.Module.__getattr__."""
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def _over(a: Any, b: Any) -> str:
    """A layer by its sizes: modules do not know their names."""
    return f"from {a.in_features:,} to {b.out_features:,} features"


def _hook(module: nn.Module) -> str:
    """What makes a module `hooked`, in words."""
    own = vars(module)
    if "forward" in own:
        return "a forward of its own"
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    found = next((hook for kind in kinds for hook in own[kind].values()), None)
    if found is None:
        return "the hooks of all modules (torch.nn.modules.module.register_module_*)"
    return f"the hook {getattr(found, '__qualname__', type(found).__name__)}"


def is_lora(module: Any) -> bool:
    """Whether a module is a LoRA layer over a linear, of those whose forward we replace."""
    kind: Any = type(module)
    return _is_lora(kind)


@functools.lru_cache(1024)  # each pass asks it of each linear
def _is_lora(kind: type) -> bool:
    return any(scope.__name__ in _CLASSES and scope.__module__ in _MODULES for scope in kind.__mro__)


_CLASSES = ("Linear", "Linear4bit", "Linear8bitLt")
_MODULES = ("peft.tuners.lora.layer", "peft.tuners.lora.bnb")


def _adapter(layer: Any, name: str, device: torch.device) -> Adapter:
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None or getattr(layer, "use_dora", {}).get(name):
        kind = type(variant).__name__.removesuffix("LinearVariant") if variant is not None else "Dora"
        raise Left(f"{kind} is not plain LoRA and runs PEFT's own forward")
    if getattr(b, "bias", None) is not None or getattr(a, "bias", None) is not None:
        raise Left("adapters with a bias (lora_bias=True) run PEFT's own forward")
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        raise Left(f"adapters made of {type(a).__name__} run PEFT's own forward")
    if type(dropout) not in (nn.Identity, nn.Dropout):
        raise Left(f"{type(dropout).__name__} before an adapter runs PEFT's own forward")
    for part, module in (("lora_A", a), ("lora_B", b), ("lora_dropout", dropout)):
        if hooked(module):
            raise Left(
                f"layers with hooks on their adapter run PEFT's own forward: {part} of {name!r} {_over(a, b)} has "
                f"{_hook(module)}; remove it, or put it on the whole layer"
            )
    _reachable(a.weight, b.weight, device=device)
    share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Adapter(a.weight, b.weight, float(layer.scaling[name]), share)


def _base(
    module: Any, x_dtype: torch.dtype, device: torch.device, autocast: torch.dtype | None
) -> tuple[Base, torch.dtype]:
    kind = "dense" if type(module) is nn.Linear else _quantised(module)
    if kind is None:
        raise Left(f"a base of {type(module).__name__} runs PEFT's own forward")
    if is_zero3(module.weight):
        raise Left("weights that ZeRO-3 gathers for a linear's own call run PEFT's own forward")
    if hooked(module):
        raise Left(
            "layers with hooks on their base, or a base that was moved to another device, run PEFT's own forward: "
            f"the one {_over(module, module)} has {_hook(module)}; remove it, put it on the whole layer, or load the "
            "model onto one device"
        )
    weight, bias = module.weight, module.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise Left("a base with trainable weights or biases runs PEFT's own forward")
    _reachable(weight, *(() if bias is None else (bias,)), device=device)
    if kind == "dense":
        if autocast is None and x_dtype != weight.dtype:
            raise Left  # torch says what is wrong
        dtype = autocast or weight.dtype
        return Dense(weight, bias, dtype), dtype
    if kind == "4bit":
        return _four_bit(module, x_dtype, autocast), x_dtype
    return _eight_bit(module, x_dtype, device, autocast), x_dtype


def _quantised(module: Any) -> str | None:
    nn_module = sys.modules.get("bitsandbytes.nn")
    if nn_module is None:
        return None
    for name, kind in (("Linear4bit", "4bit"), ("Linear8bitLt", "8bit")):
        known = getattr(nn_module, name)
        if isinstance(module, known) and type(module).forward is known.forward:
            return kind
    return None


def _four_bit(module: Any, x_dtype: torch.dtype, autocast: torch.dtype | None) -> FourBit:
    state = getattr(module.weight, "quant_state", None)
    # Loaded without its state, which its own forward sets right, or packed for inference on the CPU
    if state is None or getattr(state, "packing_format_for_cpu", False):
        raise Left
    if not module.compute_type_is_set:  # as its own forward does in its first call
        module.set_compute_type(torch.empty((2, 1), dtype=x_dtype))
        module.compute_type_is_set = True
    dtype = module.compute_dtype or x_dtype
    if autocast not in (None, dtype):
        raise Left(f"a 4-bit base that computes in {dtype} under autocast in {autocast} runs PEFT's own forward")
    if tuple(state.shape) != (module.out_features, module.in_features):
        raise Left("a 4-bit base that is stored transposed runs PEFT's own forward")
    return FourBit(module.weight, state, module.bias, dtype, x_dtype)


def _eight_bit(module: Any, x_dtype: torch.dtype, device: torch.device, autocast: torch.dtype | None) -> EightBit:
    if module.state.has_fp16_weights:
        raise Left("an 8-bit base that keeps 16-bit weights (has_fp16_weights=True) runs PEFT's own forward")
    if autocast is not None and device.type != "cuda":
        raise Left("an 8-bit base under autocast on the CPU runs PEFT's own forward")
    return EightBit(module.forward, module.state, x_dtype)


def _reachable(*tensors: torch.Tensor, device: torch.device) -> None:
    for tensor in tensors:
        if is_sharded(tensor) or _flattened(tensor):
            raise Left("weights that are sharded, or stand for a parameter, run PEFT's own forward")
        if tensor.device != device:
            raise Left("weights on another device than their input run PEFT's own forward")


def _flattened(tensor: torch.Tensor) -> bool:
    """Whether FSDP shows this as a view of its flat parameter."""
    return getattr(tensor, "_fsdp_flattened", False) or not isinstance(tensor, nn.Parameter)
