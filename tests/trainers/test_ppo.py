"""PPO (TRL up to 1.12), stock against patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .adapters import lora
from .parity import check, patched, skip_unless_known
from .runs import Case, build

pytestmark = pytest.mark.trl

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "k3": {"kl_estimator": "k3"},
    "whitened": {"whiten_rewards": True},
    "mini-batches": {"num_mini_batches": 2, "per_device_train_batch_size": 2},
    "rollout-chunks": {"local_rollout_forward_batch_size": 3},
    "generates-samples": {"num_sample_generations": 1},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str) -> None:
    check(Case("PPO", OPTIONS[option]))


def test_lora_without_reference_model() -> None:
    check(Case("PPO", peft=lora(), extra=lambda path: {"ref_model": None}))


def test_rollout_log_probs_equal_those_of_the_stack() -> None:
    """The log-probability read off step by step is that of the stacked scores, [B, T, V], which stock keeps."""
    case = Case("PPO")
    skip_unless_known(case)
    from transformers import GenerationConfig
    from trl.experimental.ppo import ppo_trainer

    trainer = build(case)
    queries = next(iter(trainer.dataloader))["input_ids"]
    config = GenerationConfig(max_new_tokens=8, temperature=0.7 + 1e-7, top_k=0, top_p=1.0, do_sample=True)

    def rollout() -> tuple[torch.Tensor, Any]:
        torch.manual_seed(1)
        with torch.no_grad():
            return ppo_trainer.batch_generation(trainer.model.policy, queries, 3, 0, config)

    stock, scores = rollout()
    response = stock[:, queries.shape[1] :]
    assert scores.shape[:2] == response.shape
    expected = ppo_trainer.selective_log_softmax(scores, response)
    with patched():
        ours, stand_in = rollout()
        assert not isinstance(stand_in, torch.Tensor)
        found = ppo_trainer.selective_log_softmax(stand_in, response)
    assert torch.equal(stock, ours)
    real = response != 0
    assert real.any()
    # The same scores, and two ways to write one formula: a rounding of the log-probability and one of each score
    assert (found - expected)[real].abs().max() <= 8 * 2**-24 * scores[scores.isfinite()].abs().max()
