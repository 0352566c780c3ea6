"""What stands at the end of a causal language model: a plain projection, one under an adapter, or something else.

Heads are told apart by what they do, not by the model they belong to. Whatever is not understood stays a callable and
is scored through the module itself, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trl_turbo.compat.sharded import foreign_hooks


@dataclass(frozen=True)
class Head:
    """An output head, taken apart as far as it is understood.

    Attributes:
        weight: Projection `[V, H]`, or `None` where only `module` may be called.
        bias: `[V]` or `None`.
        adapter: Maps hidden states `[N, H]` to the adapter's low-rank activations `[N, R]`, dropout and scaling
            included; `None` without an active adapter.
        adapter_weight: The adapter's output side `[V, R]`, or `None`.
        in_fp32: Whether the projection runs in float32 outside autocast, as TRL's `cast_lm_head_to_fp32` asks.
        module: Maps hidden states `[N, H]` to logits `[N, V]`, the way the model itself does.
        reason: Why `weight` is `None`, in words; empty otherwise.
    """

    module: Callable[[torch.Tensor], torch.Tensor]
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    adapter: Callable[[torch.Tensor], torch.Tensor] | None = None
    adapter_weight: torch.Tensor | None = None
    in_fp32: bool = False
    reason: str = ""


def describe_head(module: nn.Module) -> Head:
    """Take an output head apart.

    Hooks of `module` itself are the caller's: it sees hidden states behind the pre-hooks, and what the forward hooks do
    to the logits. Hooks further in keep a head whole.

    Args:
        module: The model's output embeddings, adapters and wrappers included.

    Returns:
        A `Head`. Its `weight` is `None` where the head must be called as a whole, with the `reason` in words.
    """
    inner, why = _active_module(module)
    if inner is None:
        return Head(module.forward, reason=why)
    if inner is not module:
        return _inner_head(inner, module.forward)
    if _is_lora_linear(module):
        return _lora_head(module, module.forward)
    return _linear_head(module, module.forward)


def _inner_head(module: nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> Head:
    if foreign_hooks(module):
        return Head(call, reason="a layer inside the head carries hooks")
    return replace(describe_head(module), module=call)


def _linear_head(module: nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> Head:
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    in_fp32 = False
    if not isinstance(module, nn.Linear):
        return Head(call, reason=f"the head is a {name}, not a linear layer")
    own = vars(module).get("forward")
    # TRL (GRPO, `cast_lm_head_to_fp32`) sets a pre-hook of the first name (up to 1.7), or replaces the instance's
    # forward by a float32 projection of the second. Delete both when TRL < 1.15 is no longer supported: later versions
    # pass it to their fused head instead.
    if any(getattr(hook, "__name__", "") == "cast_inputs_to_fp32" for hook in module._forward_pre_hooks.values()):
        in_fp32 = True
    if own is not None:
        in_fp32 = getattr(own, "__name__", "") == "cast_forward_to_fp32"
        if not in_fp32:
            return Head(call, reason=f"the head's forward was replaced on the instance ({name})")
    elif type(module).forward is not nn.Linear.forward:
        return Head(call, reason=f"the head is a {name} with a forward of its own")
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        return Head(call, reason="the head's weight is not a floating-point matrix")
    return Head(call, weight=weight, bias=module.bias, in_fp32=in_fp32)


def active_copy(module: nn.Module) -> nn.Module | None:
    """What PEFT's `modules_to_save` wrapper calls now, or the module itself; `None` where that is unclear."""
    return _active_module(module)[0]


def _active_module(module: Any) -> tuple[nn.Module | None, str]:
    """See through PEFT's `modules_to_save` wrapper: the copy in use, or the original while adapters are off."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module, ""
    active = [name for name in getattr(module, "active_adapters", []) if name in copies]
    if getattr(module, "disable_adapters", False) or not active:
        return module.original_module, ""
    if len(active) > 1:
        return None, "several saved copies of the head are active at once"
    return copies[active[0]], ""


def _is_lora_linear(module: Any) -> bool:
    return all(hasattr(module, name) for name in ("base_layer", "lora_A", "lora_B", "scaling", "active_adapters"))


def _lora_head(module: Any, call: Callable[[torch.Tensor], torch.Tensor]) -> Head:
    base = _inner_head(module.base_layer, call)
    if base.weight is None or base.in_fp32:
        return Head(call, reason=base.reason or "the adapted head is also cast to float32")
    if "forward" in vars(module):
        return Head(call, reason="the adapted head's forward was replaced on the instance")
    if module.disable_adapters or module.merged:
        # PEFT unmerges a merged head the first time it is called with its adapters off; do the same
        if module.disable_adapters and module.merged:
            module.unmerge()
        return Head(call, weight=base.weight, bias=base.bias)
    names = [name for name in module.active_adapters if name in module.lora_A]
    for name in names:
        if name in getattr(module, "lora_variant", {}) or getattr(module, "use_dora", {}).get(name, False):
            return Head(call, reason=f"adapter '{name}' on the head is a LoRA variant (such as DoRA)")
        if getattr(module.lora_B[name], "bias", None) is not None:
            return Head(call, reason=f"adapter '{name}' on the head has a bias")
    if not names:
        return Head(call, weight=base.weight, bias=base.bias)

    def low_rank(hidden: torch.Tensor) -> torch.Tensor:
        parts = []
        for name in names:
            down = module.lora_A[name]
            x = hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(down.weight.dtype)
            parts.append(down(module.lora_dropout[name](x)) * module.scaling[name])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    up = [module.lora_B[name].weight for name in names]
    return Head(
        call,
        weight=base.weight,
        bias=base.bias,
        adapter=low_rank,
        adapter_weight=up[0] if len(up) == 1 else torch.cat(up, dim=-1),
    )
