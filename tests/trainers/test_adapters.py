"""Adapters of every kind and where they sit, stock against patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trl

from .adapters import adapted, lora
from .parity import TRL_HAS_FUSED_HEAD, check, check_against_plain_torch
from .runs import Case, build

pytestmark = pytest.mark.trl

BETA = {"beta": 0.1}
ON_HEAD = ("q_proj", "lm_head")
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "dropout": lora(lora_dropout=0.3),
    "bias": lora(bias="lora_only"),
    "all-linear": lora("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "saved-head": lora(modules_to_save=["lm_head"]),
}
HEADS: dict[str, Callable[[], Any]] = {
    "lora": lora(*ON_HEAD),
    "rslora": lora(*ON_HEAD, use_rslora=True),
    "dora": lora(*ON_HEAD, use_dora=True),
    "lora-bias": lora(*ON_HEAD, lora_bias=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_grpo(kind: str) -> None:
    check(Case("GRPO", {**BETA, "disable_dropout": kind == "dropout"}, family="qwen2-untied", peft=KINDS[kind]))


def test_grpo_with_ref_adapter() -> None:
    """The script's model carries an adapter: TRL scores the reference with a copy of it, named "ref"."""
    case = Case("GRPO", BETA, family="qwen2-untied", model=adapted(lora()))
    if "ref" not in build(case).model.peft_config:
        pytest.skip(f"TRL {trl.__version__} makes no adapter named ref")
    check(case)


@pytest.mark.parametrize("trainer", ["GRPO", "DPO", "OnlineDPO"])
@pytest.mark.parametrize("kind", HEADS)
def test_adapter_on_head(trainer: str, kind: str) -> None:
    """TRL 1.15 and later refuse it in GRPO and DPO: there the yardstick is plain torch on the same seam."""
    case = Case(trainer, {"max_steps": 2}, family="qwen2-untied", peft=HEADS[kind])
    understood = kind in ("lora", "rslora")
    if not TRL_HAS_FUSED_HEAD or trainer == "OnlineDPO":
        path = check(case, () if understood else ("scored through the head itself",))
        assert bool(path.through_head) != understood
        return
    with pytest.raises(ValueError, match="head"):
        build(case)
    if understood:
        check_against_plain_torch(case)
