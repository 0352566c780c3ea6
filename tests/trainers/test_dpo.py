"""DPO, stock against patched: every loss type, every f-divergence, and what decides where the reference comes from."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import trl

from .adapters import adapted, lora
from .models import load
from .parity import check
from .runs import Case

pytestmark = pytest.mark.trl

SOURCE = inspect.getsource(trl.DPOTrainer)
LOSS_TYPES = sorted(set(re.findall(r"loss_type == \"(\w+)\"", SOURCE)))
DIVERGENCES = sorted(set(re.findall(r"f_divergence_type == \"(\w+)\"", SOURCE)))
OPTIONS: dict[str, dict[str, Any]] = {
    "weighted-losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "wpo": {"use_weighting": True},
    "label-smoothing": {"label_smoothing": 0.1},
    "ld-alpha": {"ld_alpha": 0.5},
    "precomputed-ref": {"precompute_ref_log_probs": True},
    "padding-free": {"padding_free": True},  # which every version so far turns off again, with a warning
    "sync-ref": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    "truncation": {"max_length": 14},
    "truncation-keep-end": {"max_length": 14, "truncation_mode": "keep_end"},
    "pad-to-multiple": {"pad_to_multiple_of": 16},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2},
}


def test_every_loss_type_is_found() -> None:
    assert {"sigmoid", "hinge", "ipo", "sft", "apo_zero"} <= set(LOSS_TYPES)
    assert {"reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"} <= set(DIVERGENCES)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_type(loss_type: str) -> None:
    smoothing = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
    check(Case("DPO", {"loss_type": [loss_type], **smoothing}))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_f_divergence(divergence: str) -> None:
    check(Case("DPO", {"f_divergence_type": divergence}))


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str) -> None:
    check(Case("DPO", OPTIONS[option]))


def test_ref_model_given() -> None:
    check(Case("DPO", model=load, extra=lambda path: {"ref_model": load(path)}))


@pytest.mark.parametrize("option", ["plain", "precomputed-ref", "wpo"])
def test_lora(option: str) -> None:
    check(Case("DPO", OPTIONS.get(option, {}), peft=lora()))


def test_lora_with_ref_adapter() -> None:
    check(Case("DPO", model=adapted(lora())))
