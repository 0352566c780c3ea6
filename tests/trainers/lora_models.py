"""Tiny models with LoRA layers, one pass through them, and which of our functions ran meanwhile."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch as replaced

import torch
from peft import LoraConfig, get_peft_model

import trl_turbo
from trl_turbo.patches.lora import group, layers, mlp
from trl_turbo.patches.lora.models import hook_model

from .models import ALONE, VOCAB, folder, load

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHI3 = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def adapted(family: str = "llama", targets: list[str] = ALL, **settings: Any) -> Any:
    """A PEFT model in training mode whose adapters matter from the start."""
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings}
    path = folder(family)  # whose making draws random numbers, the first time
    torch.manual_seed(8)
    return get_peft_model(load(path), LoraConfig(target_modules=targets, **options)).train()


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def passed(model: Any, ids: torch.Tensor | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The logits, and the gradient of every parameter that has one."""
    model.zero_grad()
    torch.manual_seed(3)
    logits = model(input_ids=tokens() if ids is None else ids, use_cache=False, **kwargs).logits
    if logits.requires_grad:
        weights = torch.linspace(-1, 1, VOCAB, dtype=logits.dtype)
        (logits * weights).tanh().mean().backward()
    grads = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


@contextlib.contextmanager
def patched(model: Any = None) -> Iterator[Counter[str]]:
    """Patch, let our classes take in a model as `Accelerator.prepare_model` does, and count what runs."""
    ran: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            ran[name] += 1
            return function(*args, **kwargs)

        return call

    report = trl_turbo.patch(**{**ALONE, "lora": True}, strict=True, verbose=False)
    already = len(report.notes)
    try:
        with contextlib.ExitStack() as stack:
            for module, name in ((layers, "lora_linear"), (group, "lora_qkv"), (mlp, "lora_mlp")):
                wrapped = counted(name.removeprefix("lora_"), getattr(module, name))
                stack.enter_context(replaced.object(module, name, wrapped))
            if model is not None:
                hook_model(model)
            yield ran
    finally:
        ran.notes = tuple(note.text for note in report.notes[already:] if note.feature == "lora")  # type: ignore[attr-defined]
        trl_turbo.unpatch()


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest distance of two tensors of one name, by norm, relative to the larger of all."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    grads = [t.double().norm() for name, t in other.items() if name != "logits"]
    scale = torch.stack(grads).norm().item() if grads else 1.0
    apart = [(one[n] - other[n]).double().norm().item() / scale for n in one if n != "logits"]
    logits = (one["logits"] - other["logits"]).double().norm() / other["logits"].double().norm()
    return max(logits.item(), *apart, 0.0)
