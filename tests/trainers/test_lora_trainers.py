"""Whole trainings with LoRA on every linear, stock against `patch(lora=True)`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_turbo
from trl_turbo.patches.lora import group, mlp

from .adapters import adapted, lora
from .lora_models import ALL
from .parity import check
from .runs import Case, build, train

pytestmark = pytest.mark.trl

CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
CASES: dict[str, Case] = {
    "grpo": Case("GRPO", {"beta": 0.1}, peft=lora(*ALL)),
    "grpo-bf16-checkpointed": Case(
        "GRPO", {"bf16": True, "max_steps": 2, **CHECKPOINTED}, "llama", dtype=torch.bfloat16, peft=lora(*ALL)
    ),
    "grpo-ref-adapter": Case("GRPO", {"beta": 0.1, "max_steps": 2}, "qwen2-untied", model=adapted(lora(*ALL))),
    "grpo-dropout": Case("GRPO", {"max_steps": 2}, peft=lora(*ALL, lora_dropout=0.2)),
    "dpo": Case("DPO", {"max_steps": 2}, "gemma2", peft=lora(*ALL)),
    "dpo-bf16": Case("DPO", {"bf16": True, "max_steps": 2}, dtype=torch.bfloat16, peft=lora(*ALL)),
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Turn the feature on, and count the calls of two of its functions."""
    monkeypatch.setenv("TRL_TURBO_LORA", "1")
    found = {"lora_qkv": 0, "lora_mlp": 0}

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    count(group, "lora_qkv")
    count(mlp, "lora_mlp")
    return found


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_stock(name: str, ran: dict[str, int]) -> None:
    check(CASES[name])
    assert ran["lora_qkv"] >= 4, ran
    assert ran["lora_mlp"] >= 4, ran


def test_training_goes_on_after_unpatch(ran: dict[str, int]) -> None:
    trl_turbo.patch(strict=True, verbose=False)
    trainer = build(Case("DPO", {"max_steps": 1}, peft=lora(*ALL)))
    train(trainer)
    before = dict(ran)
    assert before["lora_mlp"]
    trl_turbo.unpatch()
    assert train(trainer).series["training loss"]
    assert ran == before
    assert not trl_turbo.status().by_status("applied", "blocked")
