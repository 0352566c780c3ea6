"""The dashboard on a GPU: memory by phase is what torch has allocated, nobody's peak is reset, and the numbers stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import set_seed

import trl_turbo

from .trainings import grpo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.trl,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def test_memory_by_phase_and_the_same_numbers(tiny: Path, tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        trl_turbo.patch(dashboard=on, verbose=False)
        set_seed(5)
        trainer = grpo(tiny, tmp_path / str(on), 4, use_cpu=False, beta=0.1, num_iterations=2, disable_tqdm=True)
        torch.cuda.reset_peak_memory_stats()
        held = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        del held
        set_seed(7)
        trainer.train()
        assert torch.cuda.max_memory_allocated() >= 512 << 20, "a peak from before the training is there still"
        found.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
    assert len(found[0]) == 4
    # To the bit on the CPU; here sums of some gradients depend on the order in which threads add
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    lines = (tmp_path / "True" / "_trl_turbo" / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    phases = {name: value for name, value in row.items() if name.startswith("memory/")}
    assert {"memory/sampling", "memory/scoring", "memory/loss", "memory/optimizer", "memory/training"} <= set(phases)
    assert all(0 < value < 0.5 for value in phases.values()), phases
