"""One step through models of many families: what each does to its logits is found out, not looked up."""

from __future__ import annotations

from typing import Any

import pytest

from .models import FAMILIES
from .parity import check
from .runs import Case

pytestmark = pytest.mark.trl


@pytest.mark.parametrize("trainer", ["GRPO", "DPO", "OnlineDPO"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, trainer: str) -> None:
    options: dict[str, Any] = {"max_steps": 1, "beta": 0.1} if trainer == "GRPO" else {"max_steps": 1}
    path = check(Case(trainer, options, family=family))
    if FAMILIES[family][1].get("final_logit_softcapping"):
        assert all(call.arguments["softcap"] == 5.0 for call in path.kernel)


@pytest.mark.parametrize("trainer", ["GRPO", "RLOO", "DPO"])
def test_auxiliary_loss_of_experts(trainer: str) -> None:
    """The router's load-balancing loss is part of the loss wherever this TRL adds it."""
    check(Case(trainer, {"router_aux_loss_coef": 0.5}, family="qwen3-moe"))
