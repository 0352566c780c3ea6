"""What only a CUDA machine can run: how many graphs wait for backward is found from the memory that is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trl_turbo.patches.shared_pass import room

from .adapters import lora
from .parity import check
from .runs import Case
from .test_shared_pass import passes

pytestmark = [pytest.mark.trl, pytest.mark.gpu]

STEPS, MICRO_BATCHES = 3, 4
OPTIONS = {
    "use_cpu": False,
    "bf16": True,
    "beta": 0.0,
    "max_steps": STEPS,
    "gradient_accumulation_steps": MICRO_BATCHES,
    "steps_per_generation": MICRO_BATCHES,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}
ONCE = STEPS * MICRO_BATCHES


# The first rollout is measured (of an engine's, the second), so that it shares one micro-batch whatever there is
@pytest.mark.parametrize(
    ("released", "apart", "said"),
    [(0, STEPS, ["more would take more memory"]), (1 << 40, 1, [])],
    ids=["no-room", "room"],
)
@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_graphs_wait_where_there_is_room(
    released: int, apart: int, said: list[str], peft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(room, "released_bytes", lambda trainer: released)
    path = check(Case("RLOO", OPTIONS, dtype=torch.bfloat16, peft=peft))
    with_gradient, without = passes(path)
    # A pass over the others is in chunks of a micro-batch
    assert (with_gradient, without) == (ONCE, apart * (MICRO_BATCHES - 1))
    mine = [text for text in path.others if "RLOOTrainer" in text]
    assert len(mine) == len(said)
    assert all(part in text for part, text in zip(said, mine, strict=True))
