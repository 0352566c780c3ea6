"""OnlineDPO, stock against patched."""

from __future__ import annotations

from typing import Any

import pytest

from .adapters import lora
from .parity import check
from .runs import Case

pytestmark = pytest.mark.trl

OPTIONS: dict[str, dict[str, Any]] = {
    "sampled": {},
    "sigmoid": {"loss_type": "sigmoid"},
    "ipo": {"loss_type": "ipo"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "truncation": {"max_length": 20},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str) -> None:
    check(Case("OnlineDPO", OPTIONS[option], canned=option != "sampled"))


def test_lora() -> None:
    check(Case("OnlineDPO", peft=lora()))
