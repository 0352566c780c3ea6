"""RLOO, stock against patched."""

from __future__ import annotations

from typing import Any

import pytest

from .adapters import lora
from .parity import check
from .runs import Case

pytestmark = pytest.mark.trl

OPTIONS: dict[str, dict[str, Any]] = {
    "sampled": {},
    "beta": {"beta": 0.1},
    "no-beta": {"beta": 0.0},
    "two-iterations": {"num_iterations": 2, "max_steps": 4},
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    "accumulation-unaligned": {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "max_steps": 2},
    "mask-truncated": {"mask_truncated_completions": True},
    "normalized": {"normalize_advantages": True, "reward_clip_range": (1.8, 2.2)},
    "sync-ref": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "beta": 0.1},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 2, "max_steps": 2},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str) -> None:
    check(Case("RLOO", OPTIONS[option], canned=option != "sampled"))


def test_lora() -> None:
    check(Case("RLOO", {"beta": 0.1}, peft=lora()))
