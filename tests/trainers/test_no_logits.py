"""No step of a patched trainer makes a tensor of batch x sequence x vocabulary elements, in whatever shape."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_turbo.patches.logprob import forward, fused_head

from .adapters import lora
from .models import VOCAB
from .parity import TRL_HAS_FUSED_HEAD, patched, skip_unless_known
from .runs import Case, build, train

pytestmark = pytest.mark.trl

BUDGET_BYTES = 16 * 1024
# Tokens that a pass scores: 8 answers of 8 tokens; in DPO, chosen ones of 15 and rejected ones of 7 or more
ROWS = {"DPO": 8 * 15 + 8 * 7, "DPO-wpo": 8 * 15 + 8 * 7}
FEWEST_ROWS = 8 * 8
HIDDEN = 32
BATCH = {"per_device_train_batch_size": 8, "max_steps": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "GRPO": {**BATCH, "beta": 0.1},
    "RLOO": {**BATCH, "beta": 0.1},
    "DPO": {**BATCH, "loss_type": ["sigmoid", "sft"]},
    "DPO-wpo": {**BATCH, "use_weighting": True},
    "OnlineDPO": {**BATCH, "per_device_train_batch_size": 4},
    "PPO": {"per_device_train_batch_size": 8, "local_rollout_forward_batch_size": 8, "gradient_accumulation_steps": 1},
}


class Largest(TorchDispatchMode):
    """Keeps the largest tensor that any operation returned, and the largest that is as long as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.any: tuple[int, str] = (0, "")
        self.of_vocabulary: tuple[int, str] = (0, "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                # A view takes no memory of its own, however far it is expanded
                elements = min(leaf.numel(), leaf.untyped_storage().nbytes() // leaf.itemsize)
                found = elements, f"{func} {tuple(leaf.shape)}"
                self.any = max(self.any, found)
                head = sorted(leaf.shape) == [HIDDEN, VOCAB] or not leaf.is_floating_point()  # its bytes on their way
                if VOCAB in leaf.shape and not head:  # nor its gradient
                    self.of_vocabulary = max(self.of_vocabulary, found)
        return result


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles far smaller than the whole: by default all of a tiny run fits into one."""
    for module in (forward, fused_head):
        monkeypatch.setattr(module, "linear_logprob", partial(module.linear_logprob, byte_budget=BUDGET_BYTES))


def case_of(name: str, adapter: Any = None) -> Case:
    trainer = name.split("-")[0]
    reference = {"ref_model": None} if trainer == "PPO" and adapter else {}
    return Case(trainer, OPTIONS[name], "qwen2-untied", peft=adapter, extra=lambda path: reference)


def largest(case: Case) -> Largest:
    trainer = build(case)
    with Largest() as seen:
        train(trainer)
    return seen


@pytest.mark.parametrize(
    "adapter", [None, lora(), lora(modules_to_save=["lm_head"])], ids=["full", "lora", "saved-head"]
)
@pytest.mark.parametrize("trainer", OPTIONS)
def test_none_is_made(trainer: str, adapter: Any) -> None:
    case = case_of(trainer, adapter)
    skip_unless_known(case)
    with patched() as path:
        seen = largest(case)
    path.assert_ours()
    # A tile, the scores of one sampled token for each answer, or a view of the head itself
    tile = max(BUDGET_BYTES // 4, 8 * VOCAB, HIDDEN * VOCAB)
    assert seen.of_vocabulary[0] <= tile, seen.of_vocabulary
    assert seen.any[0] < ROWS.get(trainer, FEWEST_ROWS) * VOCAB, seen.any


@pytest.mark.parametrize("trainer", OPTIONS)
def test_stock_is_caught(trainer: str) -> None:
    if TRL_HAS_FUSED_HEAD and trainer != "OnlineDPO":
        pytest.skip("TRL 1.15 and later make none here either")
    case = case_of(trainer)
    skip_unless_known(case)
    seen = largest(case)
    assert seen.of_vocabulary[0] >= ROWS.get(trainer, FEWEST_ROWS) * VOCAB
