"""A step that runs out of memory: what is said, what is saved, and a run that goes on as if nothing had been."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trl_turbo
from trl_turbo.engine.memory import MemoryReport
from trl_turbo.patches.memory import steps

from .adapters import lora
from .models import turn_off
from .parity import skip_unless_known, stock
from .rule import Outcome, assert_identical
from .runs import Case, build, run, train

pytestmark = pytest.mark.trl

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB."
STEPS = {"max_steps": 4, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
CASES = {
    "GRPO": Case("GRPO", {**STEPS, "beta": 0.1}),
    "GRPO-lora-accumulated": Case("GRPO", {**STEPS, "gradient_accumulation_steps": 2}, peft=lora(lora_dropout=0.1)),
    "DPO": Case("DPO", STEPS),
    "OnlineDPO": Case("OnlineDPO", STEPS),
}


def runs_out(trainer: Any, *, at_step: int, sampling: bool = False) -> None:
    """Let the model raise once `at_step` steps are completed, where it has gradients or, sampling, where not."""
    model = trainer.accelerator.unwrap_model(trainer.model)

    def hook(*_: Any) -> None:
        if trainer.state.global_step == at_step and torch.is_grad_enabled() != sampling:
            torch.rand(3)  # the failed step has drawn numbers that the resumed one must draw again
            raise torch.OutOfMemoryError(SAID)

    module = model.get_base_model() if hasattr(model, "get_base_model") else model
    module.get_input_embeddings().register_forward_pre_hook(hook)


def failed(case: Case, at_step: int, **options: Any) -> tuple[Any, str]:
    """The trainer whose step ran out of memory, and what was said."""
    trainer = build(case)
    runs_out(trainer, at_step=at_step, **options)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(trainer)
    return trainer, str(caught.value)


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Any:
    turn_off(monkeypatch)
    return trl_turbo.patch(memory=True, strict=True, verbose=False)


@pytest.mark.parametrize("name", CASES)
def test_resumed_as_if_nothing_had_been(name: str, patched: Any) -> None:
    case = CASES[name]
    skip_unless_known(case)
    whole = run(case)
    trainer, said = failed(case, at_step=2)
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-2"
    assert f"resume_from_checkpoint={str(checkpoint)!r}" in said
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2
    assert sorted(path.name for path in checkpoint.parent.iterdir() if path.name.startswith((".", "checkpoint"))) == [
        "checkpoint-2"
    ]
    assert all(p.grad is None for p in trainer.model.parameters())
    again = train(build(case), resume_from_checkpoint=str(checkpoint))
    _assert_continued(whole, again)


def _assert_continued(whole: Outcome, resumed: Outcome) -> None:
    for name in ("training loss", "norm of the gradient"):
        assert whole.series[name][-len(resumed.series[name]) :] == resumed.series[name], name
    for name, update in whole.tensors["update"].items():
        assert torch.equal(update, resumed.tensors["update"][name]), name


def test_words(patched: Any) -> None:
    _, said = failed(CASES["GRPO"], at_step=1)
    assert said.startswith(SAID)
    assert "trl_turbo: out of memory in training, after 1 steps." in said
    # All else is off here: turned on, norms would spare most of the part
    assert "what to change: set patch(norms=True), which keeps no copies in float32." in said
    assert "weights" in said
    assert "backward" in said
    assert said.count("trl_turbo: out of memory") == 1


def test_the_phase_is_named(patched: Any) -> None:
    case = Case("GRPO", {**STEPS, "steps_per_generation": 1}, canned=False)
    _, said = failed(case, at_step=1, sampling=True)
    assert "out of memory in rollout" in said


def test_accelerate_still_knows_it(patched: Any) -> None:
    from accelerate.utils.memory import should_reduce_batch_size

    trainer = build(CASES["DPO"])
    runs_out(trainer, at_step=0)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    assert should_reduce_batch_size(caught.value)
    assert "no step was completed; there is no checkpoint of this run" in str(caught.value)


def test_a_checkpoint_that_is_there_is_named(patched: Any) -> None:
    case = Case("DPO", {**STEPS, "save_strategy": "steps", "save_steps": 2})
    trainer, said = failed(case, at_step=2)
    assert "checkpoint-2'" in said
    trainer, said = failed(case, at_step=3)
    assert "checkpoint-3'" in said
    assert {path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-3",
    }


def test_a_checkpoint_of_another_run_is_not_taken_for_ones_own(patched: Any) -> None:
    trainer = build(CASES["DPO"])
    root = Path(trainer.args.output_dir)
    for step in (1, 3):
        (root / f"checkpoint-{step}").mkdir(parents=True)
        state = root / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text("another's")
        os.utime(state, (0, 0))
    runs_out(trainer, at_step=1)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(trainer)
    (saved,) = (path for path in root.glob("checkpoint-1-*"))
    assert f"resume_from_checkpoint={str(saved)!r}" in str(caught.value)
    assert (root / "checkpoint-1" / "trainer_state.json").read_text() == "another's"
    assert train(build(CASES["DPO"]), resume_from_checkpoint=str(saved)).series["training loss"]


def test_no_broken_checkpoint(patched: Any) -> None:
    """Saving fails as well: nothing half written is left, and the last whole one is named."""
    case = Case("DPO", {**STEPS, "save_strategy": "steps", "save_steps": 2})
    trainer = build(case)
    runs_out(trainer, at_step=3)
    save = trainer._save_rng_state

    def full(output_dir: str) -> None:
        if trainer.state.global_step == 3:
            raise OSError("No space left on device")
        save(output_dir)

    trainer._save_rng_state = full
    with pytest.raises(torch.OutOfMemoryError, match=r"saving step 3 failed \(OSError: No space left.*checkpoint-2'"):
        train(trainer)
    names = {path.name for path in Path(trainer.args.output_dir).iterdir() if path.is_dir()}
    assert not any(name.startswith(".") or name == "checkpoint-3" for name in names)


def test_out_of_a_step_nothing_is_saved(patched: Any) -> None:
    """In the optimizer's step: half of the weights may be updated."""
    trainer = build(CASES["DPO"])
    create = trainer.create_optimizer

    def create_optimizer(*args: Any) -> Any:
        optimizer = create(*args)

        def step(*_: Any) -> None:
            if trainer.state.global_step == 1:
                raise torch.OutOfMemoryError(SAID)

        optimizer.register_step_pre_hook(step)
        return optimizer

    trainer.create_optimizer = create_optimizer
    with pytest.raises(torch.OutOfMemoryError, match="not in a step of the trainer's"):
        train(trainer)
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))


def test_ppo(patched: Any) -> None:
    case = Case("PPO")
    skip_unless_known(case)
    trainer = build(case)

    def hook(*_: Any) -> None:
        if trainer.state.global_step == 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError(SAID)

    trainer.accelerator.unwrap_model(trainer.model).policy.register_forward_pre_hook(hook)
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)out of memory in training.*one layer") as caught:
        trainer.train()
    assert str(caught.value).startswith(SAID)


def test_ppo_that_samples_when_memory_runs_out(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("PPO")
    skip_unless_known(case)
    trainer = build(case)
    policy = trainer.accelerator.unwrap_model(trainer.model).policy

    def generate(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(policy, "generate", generate)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory in rollout"):
        trainer.train()


def test_ppo_is_measured_before_its_loop_empties_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of a driver: what is in use grows with what runs, and is given back where the loop says so."""
    case = Case("PPO")
    skip_unless_known(case)
    from trl.experimental.ppo import ppo_trainer

    taken = {"now": 1}

    def taking(size: Any, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            taken["now"] = max(taken["now"], size())
            return function(*args, **kwargs)

        return call

    def empty_cache() -> None:
        taken["now"] = 1

    monkeypatch.setattr(ppo_trainer, "batch_generation", taking(lambda: 7 << 30, ppo_trainer.batch_generation))
    forward = taking(lambda: (5 if torch.is_grad_enabled() else 3) << 30, ppo_trainer.forward)
    monkeypatch.setattr(ppo_trainer, "forward", forward)
    monkeypatch.setattr(ppo_trainer, "empty_cache", empty_cache)

    def measure(trainer: Any, phase: str) -> None:
        current = steps.current_peaks()
        assert current is not None
        current.measure(phase, taken["now"])

    monkeypatch.setattr(steps, "measure", measure)
    turn_off(monkeypatch)
    trl_turbo.patch(memory=True, strict=True, verbose=False)
    train(build(case))
    peaks = trl_turbo.status().peaks
    assert {phase: found["measured"] for phase, found in peaks.items()} == {"rollout": 7 << 30, "training": 5 << 30}
    assert all(found["predicted"] > 0 for found in peaks.values())
    assert steps.training() is None


@pytest.mark.parametrize("trainer", ["GRPO", "RLOO", "DPO", "OnlineDPO", "PPO"])
def test_a_run_that_fits_is_stocks(trainer: str, patched: Any) -> None:
    case = Case(trainer)
    skip_unless_known(case)
    trl_turbo.unpatch()
    plain = stock(case)[0]
    trl_turbo.patch(memory=True, strict=True, verbose=False)
    assert_identical(plain, run(case))


def test_status_has_the_plan_and_the_peaks(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([1 << 30, 3 << 30, 2 << 30] * 100)
    monkeypatch.setattr(
        steps,
        "measure",
        lambda trainer, phase: steps.current_peaks().measure(phase, next(used)),  # type: ignore[union-attr]
    )
    run(Case("GRPO", {"max_steps": 2}))
    found = trl_turbo.status()
    assert set(found.peaks) == {"rollout", "training"}
    assert found.peaks["training"]["measured"] == 3 << 30
    assert "memory  training: predicted" in str(found)
    assert "measured 3.00 GiB" in str(found)
    assert type(found).from_json(found.to_json()).peaks == found.peaks
    trl_turbo.unpatch()
    assert not trl_turbo.status().peaks


def test_plan_of_a_trainer(patched: Any) -> None:
    for case in (Case("GRPO", {"beta": 0.1}), Case("DPO"), Case("OnlineDPO", peft=lora())):
        if case.missing():
            continue
        trainer = build(case)
        plan = trl_turbo.plan(trainer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        adapters = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
        weights = sum(p.nbytes for p in model.parameters()) - adapters
        assert plan.moments["backward"]["weights"] == weights
        assert plan.moments["backward"].get("adapters", 0) == adapters
        assert plan.moments["backward"]["gradients"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)
        # A reference model of its own where there is no adapter to take off
        reference = getattr(trainer, "ref_model", None)
        own = 0 if reference is None else sum(p.nbytes for p in reference.parameters())
        assert plan.moments["backward"].get("other models", 0) == own
        assert ("rollout" in plan.moments) == (case.trainer != "DPO")


def test_plan_of_an_engine_that_runs(patched: Any) -> None:
    """What the engine reports is taken; its cache is not, while it is given up: it will be there again."""
    trainer = build(Case("GRPO"))
    report = MemoryReport(shared_bytes=1, copied_bytes=2, padding_bytes=3, kv_bytes=4, lora_bytes=5, graph_bytes=6)
    engine = SimpleNamespace(shared=SimpleNamespace(can_release=True), memory_report=lambda: report)
    trainer.use_vllm, trainer.vllm_mode, trainer.vllm_generation = True, "colocate", SimpleNamespace(llm=engine)
    rollout = trl_turbo.plan(trainer).moments["rollout"]
    assert [rollout[f"engine's {part}"] for part in ("weights", "adapter")] == [5, 5]
    assert (rollout["KV cache"], rollout["CUDA graphs"]) == (4, 6)
    assert "KV cache" not in trl_turbo.plan(trainer).moments["backward"]
    report = replace(report, kv_bytes=0, kv_released=True)
    assert trl_turbo.plan(trainer).moments["rollout"]["KV cache"] > 4
    engine.shared = None
    rollout = trl_turbo.plan(trainer).moments["rollout"]
    assert rollout["engine's weights"] == rollout["weights"]
    assert trl_turbo.plan(trainer).moments["backward"]["KV cache"] == rollout["KV cache"]


def test_plan_of_something_else() -> None:
    with pytest.raises(TypeError, match="no plan for an instance of object; pass one of GRPOTrainer, "):
        trl_turbo.plan(object())
