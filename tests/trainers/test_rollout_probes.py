"""Whether each tested TRL still has what routing replaces; needs no vLLM, which few of these environments have."""

from __future__ import annotations

import importlib

import pytest

from trl_turbo.patches.rollout import online_dpo_routing, ppo, routing

pytestmark = pytest.mark.trl


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_grpo_and_rloo(name: str) -> None:
    module = importlib.import_module(f"trl.trainer.{name}_trainer")
    assert routing.probe(module, f"{name.upper()}Trainer") is None


def test_online_dpo() -> None:
    module = importlib.import_module("trl.experimental.online_dpo.online_dpo_trainer")
    assert online_dpo_routing.probe(module) is None
    assert "no OnlineDPOTrainer" in (online_dpo_routing.probe(online_dpo_routing) or "")  # type: ignore[arg-type]


def test_ppo() -> None:
    module = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="TRL has no PPO since 1.13")
    assert ppo.probe(module) is None
    assert "no PPOTrainer" in (ppo.probe(importlib.import_module("trl.trainer.utils")) or "")
