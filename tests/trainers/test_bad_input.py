"""What the seam cannot score stays on TRL's own path, with a sentence in the report, and the result is stock's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .models import load
from .parity import TRL_HAS_FUSED_HEAD, check, check_kept, patched
from .runs import Case, build

pytestmark = pytest.mark.trl

# OnlineDPO makes logits in every version; the others leave the head to TRL from 1.15 on
TRAINERS = ["OnlineDPO"] if TRL_HAS_FUSED_HEAD else ["GRPO", "RLOO", "DPO", "OnlineDPO"]
ONE_STEP = {"max_steps": 1}


def changed(change: Callable[[Any], None]) -> Callable[[str], Any]:
    """Makes a model with something about it changed, on the instance's own class."""

    def make(path: str) -> Any:
        model = load(path)
        model.__class__ = type(type(model).__name__, (type(model),), {})
        change(model)
        return model

    return make


def without_head(model: Any) -> None:
    type(model).get_output_embeddings = lambda self: None


def sharded_head(model: Any) -> None:
    model.get_output_embeddings().weight.ds_id = 0


def clamped_logits(model: Any) -> None:
    forward = type(model).forward

    def forward_and_clamp(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = torch.clamp(output.logits, max=3.0)
        return output

    type(model).forward = forward_and_clamp


def subtracted_logits(model: Any) -> None:
    forward = type(model).forward

    def forward_and_subtract(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits - 1.0
        return output

    type(model).forward = forward_and_subtract


def written_logits(model: Any) -> None:
    forward = type(model).forward

    def forward_and_cut(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits[..., 0] = -10.0
        return output

    type(model).forward = forward_and_cut


def two_heads(model: Any) -> None:
    forward = type(model).forward

    def forward_twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.lm_head(torch.zeros(1, self.config.hidden_size))
        return forward(self, *args, **kwargs)

    type(model).forward = forward_twice


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "no-head": (without_head, "no output head"),
    "sharded-head": (sharded_head, "sharded"),
    "unknown-operation": (clamped_logits, "applies `clamp`"),
    "operator": (subtracted_logits, "__sub__"),
    "written-logits": (written_logits, "__setitem__"),
    "head-called-twice": (two_heads, "2 times"),
}


def case_of(trainer: str, make: Callable[[str], Any]) -> Case:
    """One step in which every pass, the reference's too, goes through a model that `make` made."""
    if trainer in ("DPO", "OnlineDPO"):
        return Case(trainer, ONE_STEP, model=make, extra=lambda path: {"ref_model": make(path)})
    return Case(trainer, {**ONE_STEP, "beta": 0.0}, model=make)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("change", CHANGES)
def test_model_that_is_not_understood(trainer: str, change: str) -> None:
    change_model, note = CHANGES[change]
    check_kept(case_of(trainer, changed(change_model)), note)


@pytest.mark.skipif(TRL_HAS_FUSED_HEAD, reason="from TRL 1.15 on TRL's fused head answers, by labels")
def test_prompt_tuning() -> None:
    """Virtual tokens reach the model as embeddings: there are no ids to score."""

    def prompt_tuning() -> Any:
        from peft import PromptTuningConfig

        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)

    check_kept(Case("GRPO", ONE_STEP, peft=prompt_tuning), "without input_ids")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_hooks_on_the_head_run_once(trainer: str) -> None:
    """A hook before the head and one behind it: each counts once, in the kernel's own way of scoring."""

    def hooked(model: Any) -> None:
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        head.register_forward_hook(lambda module, args, output: output * 0.5)

    check(case_of(trainer, changed(hooked)))


@pytest.mark.skipif(TRL_HAS_FUSED_HEAD, reason="TRL 1.15 and later: evaluation with compute_metrics is TRL's own")
def test_dpo_compute_metrics_needs_logits() -> None:
    metrics = {"compute_metrics": lambda prediction: {"shape": float(prediction.predictions[0].shape[0])}}
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    check(Case("DPO", options, extra=lambda path: metrics), ("compute_metrics",))


def test_sharded_trainer_is_left_alone() -> None:
    case = Case("OnlineDPO", ONE_STEP)
    trainer = build(case)
    trainer.is_fsdp_enabled = True
    with patched() as path:
        inputs = trainer.processing_class(["ab", "cd"], return_tensors="pt")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        logps = trainer._forward(trainer.model, ids, mask, ids, mask)
    assert logps.shape == ids.shape
    assert not path.requests
    assert any("FSDP" in note for note in path.notes)
