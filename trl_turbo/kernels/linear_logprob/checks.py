"""Bad input is refused in one sentence that says what is wrong, what was found and what to do."""

from __future__ import annotations

import math

import torch

from .spec import OUTPUTS, Spec


def check_spec(spec: Spec) -> None:
    """Refuse unknown outputs and numbers that make no logits."""
    unknown = [name for name in spec.outputs if name not in OUTPUTS]
    if unknown:
        raise ValueError(f"linear_logprob has no output {unknown[0]!r}; ask for some of {', '.join(OUTPUTS)}.")
    if not spec.outputs:
        raise ValueError(f"linear_logprob was asked for no outputs; ask for some of {', '.join(OUTPUTS)}.")
    transform = spec.transform
    if not (transform.temperature > 0 and math.isfinite(transform.temperature)):
        raise ValueError(f"The temperature must be above 0, and it is {transform.temperature}; pass 1.0 for none.")
    if transform.softcap is not None and not (transform.softcap > 0 and math.isfinite(transform.softcap)):
        raise ValueError(f"The softcap must be above 0, and it is {transform.softcap}; pass None for none.")
    if not math.isfinite(transform.logit_scale):
        raise ValueError(
            f"The logit scale must be a finite number, and it is {transform.logit_scale}; pass 1.0 for none."
        )
    if spec.byte_budget is not None and spec.byte_budget < 1:
        raise ValueError(f"The byte budget must be above 0, and it is {spec.byte_budget}; pass None for the default.")


def check_tensors(
    hidden: torch.Tensor,  # [N, H]
    weight: torch.Tensor,  # [V, H]
    targets: torch.Tensor,  # [N]
    bias: torch.Tensor | None,  # [V]
    low_rank: tuple[torch.Tensor, torch.Tensor] | None,  # ([N, R], [V, R])
) -> None:
    """Refuse shapes, dtypes and devices that do not fit together; the targets' values are another check."""
    if hidden.ndim != 2:
        raise ValueError(
            f"hidden must be [N, H], and its shape is {list(hidden.shape)}; flatten batch and sequence first."
        )
    if weight.ndim != 2:
        raise ValueError(
            f"weight must be [V, H], and its shape is {list(weight.shape)}; a quantised or sharded head goes through "
            "head_logprob."
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has {hidden.shape[1]} features and weight takes {weight.shape[1]}; pass the last hidden states "
            "that this head belongs to."
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows, so there is no vocabulary; under ZeRO-3 or FSDP gather the head first.")
    check_targets_shape(hidden.shape[0], hidden.device, targets)
    _check_float("hidden", hidden)
    _check_float("weight", weight)
    _check_device(hidden, "weight", weight)
    if bias is not None:
        _check_float("bias", bias)
        _check_device(hidden, "bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias must be [{weight.shape[0]}] as weight has rows, and its shape is {list(bias.shape)}."
            )
    if low_rank is not None:
        a, b = low_rank
        for name, factor, rows in (("low_rank[0]", a, hidden.shape[0]), ("low_rank[1]", b, weight.shape[0])):
            _check_float(name, factor)
            _check_device(hidden, name, factor)
            if factor.ndim != 2 or factor.shape[0] != rows or factor.shape[1] != a.shape[-1]:
                raise ValueError(f"{name} must be [{rows}, R], and its shape is {list(factor.shape)}.")


def check_targets_shape(n_rows: int, device: torch.device, targets: torch.Tensor) -> None:
    """Refuse targets that are not one int64 token for each row, on the rows' device."""
    if targets.ndim != 1 or targets.shape[0] != n_rows:
        raise ValueError(f"targets must be [{n_rows}], one token for each row, and its shape is {list(targets.shape)}.")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, and they are {_name(targets.dtype)}; call .long() on them.")
    if targets.device != device:
        raise ValueError(f"hidden is on {device} and targets on {targets.device}; move targets there.")


def check_targets_range(targets: torch.Tensor, vocab: int) -> None:
    """Refuse targets outside of the vocabulary. This waits for the device, so the hot path on CUDA leaves it out."""
    if targets.numel() == 0:
        return
    low, high = (int(x) for x in targets.aminmax())
    if low < 0 or high >= vocab:
        found = low if low < 0 else high
        raise ValueError(
            f"A target is {found} and the head has {vocab} tokens; mask out ignored positions first, or pass the head "
            "that belongs to this tokenizer."
        )


def _check_float(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, and it is {_name(tensor.dtype)}; a quantised head "
            "goes through head_logprob."
        )


def _check_device(hidden: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(
            f"hidden is on {hidden.device} and {name} on {tensor.device}; move hidden to the head's device."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
