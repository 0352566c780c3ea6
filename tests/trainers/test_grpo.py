"""GRPO, stock against patched: every loss type and every option that changes the loss or what it is given."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import trl

from .parity import check
from .runs import Case

pytestmark = pytest.mark.trl

SOURCE = inspect.getsource(trl.GRPOTrainer)
NAMED = re.findall(r"loss_type (?:==|in) (\[[^]]*\]|\"\w+\")", SOURCE)
LOSS_TYPES = sorted(set(re.findall(r"\w+", " ".join(NAMED))))
OPTIONS: dict[str, dict[str, Any]] = {
    "sampled": {},
    "beta": {"beta": 0.1},
    "sequence-level": {"importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.1},
    "delta": {"delta": 1.5},
    "top-entropy": {"top_entropy_quantile": 0.4},
    "entropy-bonus": {"entropy_coef": 0.05},
    "adaptive-entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 2.0},
    "off-policy-mask": {"off_policy_mask_threshold": 0.05},
    "bias-corrected-kl": {"use_bias_correction_kl": True, "beta": 0.1},
    "two-iterations": {"num_iterations": 2, "max_steps": 4},
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 3},
    "accumulation-unaligned": {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "max_steps": 2},
    "mask-truncated": {"mask_truncated_completions": True},
    "sync-ref": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "beta": 0.1},
    "fp32-head": {"cast_lm_head_to_fp32": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 2, "max_steps": 2, "beta": 0.1},
}


def case_of_loss(loss_type: str) -> Case:
    level = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    return Case("GRPO", {"loss_type": loss_type, "beta": 0.1, **level})


def test_every_loss_type_is_found() -> None:
    assert {"grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"} <= set(LOSS_TYPES)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_type(loss_type: str) -> None:
    check(case_of_loss(loss_type))


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str) -> None:
    check(Case("GRPO", OPTIONS[option], canned=option != "sampled"))
