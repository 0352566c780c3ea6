"""`fold`: adapters added to their base weights in place, such that they come out again to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import reference, table
from .spec import DTYPES, Folded, LoraLayer


@torch.no_grad()
def fold(layers: Sequence[LoraLayer], *, log_share: float = 0.25) -> Folded:
    """Add each layer's adapter to its weight [out, in] in place: weight + (lora_B * scaling) @ lora_A, in float32.

    Subtracting again loses the last bit of some elements: 0.5 % of them where the adapter adds 0.3 % of a bf16 weight's
    spread. Those are written to a log, which `Folded.restore` puts back. On a GPU three launches of a Triton kernel
    serve all layers at once (count, fold, restore); elsewhere, and for layouts that it does not take (see
    `table.takes`), plain torch does the same. Which one it was cannot be told from the restored weights.

    Args:
        layers: Weights [out, in] in float32, float16 or bfloat16 that do not overlap; adapters in any of these.
        log_share: What the log may take of the weights' bytes.

    Returns:
        What restores them. It holds on to the tensors, and the adapters must not change before it does.

    Raises:
        LogTooLargeError: The log would take more than that; the weights are unchanged.
        TypeError: A weight is in another dtype.
        ValueError: Shapes that do not fit.

    The idea of folding is that of PEFT's `merge_adapter`, which keeps no log.
    """
    for layer in layers:
        _check(layer)
    if table.takes(layers):
        try:
            from . import kernel
        except ImportError:  # torch builds without Triton (Windows)
            pass
        else:
            return kernel.fold(layers, log_share)
    return reference.fold(layers, log_share)


def _check(layer: LoraLayer) -> None:
    weight, a, b, _ = layer
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight is {weight.dtype}; a float32, float16 or bfloat16 one can be folded")
    if a.ndim != 2 or b.ndim != 2 or weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"weight is {list(weight.shape)}, lora_A {list(a.shape)} and lora_B {list(b.shape)}; they must be "
            "[out, in], [r, in] and [out, r]"
        )
