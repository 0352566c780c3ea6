"""Whole trainings with `gradient_checkpointing=True`: offloaded inputs change no bit, and tiles obey the rule.

The device is the CPU here, and the lane one that copies as late as it may: what is read too early is NaN.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import trl_turbo
from trl_turbo.patches.checkpointing import models, offload, tiled
from trl_turbo.patches.checkpointing.offload import Offloader

from .adapters import adapted, lora
from .lanes import LateLane
from .lora_models import ALL
from .models import folder, load, turn_off
from .parity import skip_unless_known, stock
from .rule import assert_identical, assert_same
from .runs import Case, build, run, train

pytestmark = pytest.mark.trl


ON = {"gradient_checkpointing": True, "max_steps": 2}
NON = {**ON, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
RE = {**ON, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
CASES: dict[str, Case] = {
    # A reference pass each step, after which TRL enables checkpointing anew
    "grpo": Case("GRPO", {**NON, "beta": 0.1, "num_iterations": 2}),
    "grpo-default": Case("GRPO", ON, "llama"),
    "grpo-lora": Case("GRPO", {**NON, "beta": 0.1}, peft=lora(*ALL)),
    "grpo-ref-adapter": Case("GRPO", {**NON, "beta": 0.1}, "qwen2-untied", model=adapted(lora())),
    "grpo-reentrant-lora": Case("GRPO", RE, peft=lora()),
    "grpo-bf16": Case("GRPO", {**NON, "bf16": True}, "llama", dtype=torch.bfloat16, peft=lora(*ALL)),
    "grpo-accumulated": Case("GRPO", {**NON, "gradient_accumulation_steps": 2}),
    "rloo": Case("RLOO", {**NON, "beta": 0.1}),
    "dpo": Case("DPO", NON, "gemma2"),
    "dpo-reentrant": Case("DPO", RE),
    "dpo-lora": Case("DPO", NON, peft=lora()),
    "online-dpo": Case("OnlineDPO", NON),
    "ppo": Case("PPO", {key: value for key, value in NON.items() if key != "max_steps"}),
}


@pytest.fixture
def offloader(monkeypatch: pytest.MonkeyPatch) -> Offloader:
    """Turn the feature on, alone, with inputs of any size on their way between two kinds of host memory."""
    turn_off(monkeypatch)
    monkeypatch.setenv("TRL_TURBO_CHECKPOINTING", "1")
    found = Offloader(LateLane(), smallest_bytes=0)
    monkeypatch.setattr(offload, "has_device", lambda: True)
    monkeypatch.setattr(offload, "offloader_of", lambda device: found)
    return found


@pytest.mark.parametrize("name", CASES)
def test_not_a_bit_changes(name: str, offloader: Offloader) -> None:
    case = CASES[name]
    skip_unless_known(case)
    plain = stock(case)[0]
    trl_turbo.patch(strict=True, verbose=False)
    ours = run(case)
    assert_identical(plain, ours)
    lane: Any = offloader.lane
    # Two layers have an input each, and the last one of a backward is not fetched; PPO's has policy and value model
    assert lane.stored >= 4
    assert lane.loaded == (3 * lane.stored // 4 if case.trainer == "PPO" else lane.stored // 2)
    assert lane.grown == 1


def test_off_again_after_unpatch(offloader: Offloader) -> None:
    report = trl_turbo.patch(strict=True, verbose=False)
    assert report["checkpointing.layers"].status in ("applied", "pending")
    trainer = build(Case("DPO", NON))
    train(trainer)
    lane: Any = offloader.lane
    before = lane.stored
    assert before
    trl_turbo.unpatch()
    assert train(trainer).series["training loss"]
    assert lane.stored == before
    assert not trl_turbo.status().by_status("applied", "blocked")


def test_models_can_be_copied_and_their_function_pickled(offloader: Offloader) -> None:
    trl_turbo.patch(strict=True, verbose=False)
    model = load(folder())
    model.gradient_checkpointing_enable()
    model.train()
    copy.deepcopy(model)(input_ids=torch.arange(12).view(1, 12)).logits.sum().backward()
    assert offloader.lane.stored == 2  # type: ignore[attr-defined]
    function = pickle.loads(pickle.dumps(model.model.layers[0]._gradient_checkpointing_func))
    assert function.func is models.offloaded


def test_passes_without_gradients_save_nothing(offloader: Offloader) -> None:
    trl_turbo.patch(strict=True, verbose=False)
    model = load(folder())
    model.gradient_checkpointing_enable()
    model.train()
    with torch.no_grad():
        model(input_ids=torch.arange(12).view(1, 12))
    assert offloader.lane.stored == 0  # type: ignore[attr-defined]


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "has_device", lambda: False)
    import transformers.modeling_utils  # noqa: F401

    row = trl_turbo.patch(checkpointing=True, strict=True, verbose=False)["checkpointing.layers"]
    assert row.status == "off"
    assert "no CUDA device" in row.reason


TILED = {
    "grpo": CASES["grpo"],
    "grpo-lora": CASES["grpo-lora"],
    "grpo-reentrant": Case("GRPO", RE, peft=lora(*ALL)),
    "grpo-bf16": CASES["grpo-bf16"],
    "dpo-gemma2": CASES["dpo"],
    "dpo-phi3": Case("DPO", NON, "phi3", peft=lora("gate_up_proj", "down_proj")),
    "rloo": CASES["rloo"],
    "online-dpo": CASES["online-dpo"],
    "ppo": CASES["ppo"],
}


@pytest.mark.parametrize("together", [False, True], ids=["alone", "with-lora-norms-mlp"])
@pytest.mark.parametrize("name", TILED)
def test_tiles_train_as_stock_does(name: str, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = TILED[name]
    skip_unless_known(case)
    plain, *perturbed = stock(case)
    turn_off(monkeypatch)
    for feature in ("mlp_tiling", *(("lora", "norms", "mlp") if together else ())):
        monkeypatch.setenv(f"TRL_TURBO_{feature.upper()}", "1")
    monkeypatch.setattr(tiled, "TILE_ROWS", 5)
    calls = []
    function = tiled.tiled
    monkeypatch.setattr(tiled, "tiled", lambda *args: calls.append(args[1].shape) or function(*args))
    report = trl_turbo.patch(strict=True, verbose=False)
    ours = run(case)
    # Our LoRA function has tiles of its own, save under reentrant checkpointing
    assert bool(calls) != (together and name in ("grpo-lora", "grpo-bf16"))
    assert not [note for note in report.notes if note.feature == "mlp_tiling"]
    assert_same(plain, ours, perturbed, case.dtype)


def test_tiles_leave_dropout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("GRPO", NON, peft=lora(*ALL, lora_dropout=0.2))
    plain = stock(case)[0]
    turn_off(monkeypatch)
    monkeypatch.setattr(tiled, "TILE_ROWS", 5)
    report = trl_turbo.patch(mlp_tiling=True, strict=True, verbose=False)
    assert_identical(plain, run(case))
    assert any("drops out inside" in note.text for note in report.notes)


def test_both_features_give_their_functions_out(offloader: Offloader, monkeypatch: pytest.MonkeyPatch) -> None:
    trl_turbo.patch(mlp_tiling=True, strict=True, verbose=False)
    model = load(folder())
    model.gradient_checkpointing_enable()
    function = model.model.layers[0]._gradient_checkpointing_func
    found = []
    while hasattr(function, "func"):
        found.append(function.func)
        function = function.args[0] if function.args else function.func
    assert {models.offloaded, models.marked} <= set(found)


@pytest.mark.parametrize("name", ["grpo-lora", "grpo-bf16", "dpo-lora", "online-dpo", "rloo"])
def test_with_all_that_is_on_by_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    skip_unless_known(case)
    plain, *perturbed = stock(case)
    found = Offloader(LateLane(), smallest_bytes=0)
    monkeypatch.setattr(offload, "has_device", lambda: True)
    monkeypatch.setattr(offload, "offloader_of", lambda device: found)
    monkeypatch.setattr(tiled, "TILE_ROWS", 5)
    trl_turbo.patch(checkpointing=True, mlp_tiling=True, memory=True, strict=True, verbose=False)
    assert_same(plain, run(case), perturbed, case.dtype)
    assert found.lane.stored  # type: ignore[attr-defined]
