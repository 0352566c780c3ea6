"""Whole trainings on packed rows, stock against patched: every trainer, many families, and all that a script may do."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch as replaced

import pytest
import torch
import trl

import trl_turbo
from trl_turbo.patches.attention import interface, passes
from trl_turbo.patches.attention.rows import Rows

from .adapters import adapted, lora
from .lora_models import ALL
from .models import PACKED, folder, load
from .parity import Path, check, patched, skip_unless_known, stock
from .rule import broken
from .runs import Case, build, run, train

pytestmark = pytest.mark.trl

ONE_STEP: dict[str, dict[str, Any]] = {
    "GRPO": {"max_steps": 1, "beta": 0.1},
    "RLOO": {"max_steps": 1, "beta": 0.1},
    "DPO": {"max_steps": 1},
    "OnlineDPO": {"max_steps": 1},
    "PPO": {},
}
SOFTCAP = "leaves out its softcap of 50"


@dataclass
class Seen:
    """What passes ran on.

    Attributes:
        rows: The packed row of each pass.
        padded: How many passes were not packed.
        calls: How many attention layers ran on a layout, recomputed ones included.
    """

    rows: list[Rows]
    padded: int = 0
    calls: int = 0

    @property
    def shared(self) -> int:
        return sum(max(rows.segments.prefix) >= 0 for rows in self.rows)

    def assert_packed(self, padded: int = 0) -> None:
        assert self.rows
        assert self.shared, "no prompt was shared"
        assert self.padded == padded, f"{self.padded} of {len(self.rows)} passes kept their padding"
        assert all(rows.segments.total < rows.shape[0] * rows.shape[1] for rows in self.rows)


def said(path: Path) -> list[str]:
    """What the report says about packing and attention."""
    words = ("keep their padding", "keep their attention", "softcap", "dropped out")
    return [text for text in path.others if any(word in text for word in words)]


def check_noted(case: Case, notes: tuple[str, ...] = (), *, late: bool = False) -> Path:
    """As `check`, with these notes about packing."""
    path = check(case, late=late)
    found = said(path)
    assert len(found) == len(notes), found
    for text, expected in zip(found, notes, strict=True):
        assert expected in text
    return path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Packing and attention as they are by default, watched."""
    monkeypatch.delenv("TRL_TURBO_PACKING", raising=False)
    monkeypatch.delenv("TRL_TURBO_ATTENTION", raising=False)
    found = Seen([])
    arrange, over_layout = passes._arrange, interface.over_layout

    def arranged(feature: str, *args: Any) -> Any:
        result = arrange(feature, *args)
        if isinstance(result, passes.Arranged) and result.rows is not None:
            found.rows.append(result.rows)
        else:
            found.padded += 1
        return result

    def counted(*args: Any) -> Any:
        found.calls += 1
        return over_layout(*args)

    with replaced.object(passes, "_arrange", arranged), replaced.object(interface, "over_layout", counted):
        yield found


def test_the_trainings_of_other_files_are_packed_with_one_trl_and_padded_with_the_others() -> None:
    arranged, arrange = [], passes._arrange

    def watched(*args: Any) -> Any:
        arranged.append(arrange(*args))
        return arranged[-1]

    with replaced.object(passes, "_arrange", watched):
        check(Case("GRPO", ONE_STEP["GRPO"]))
    assert bool(arranged) == PACKED
    assert all(isinstance(each, passes.Arranged) and each.rows is not None for each in arranged)


@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("trainer", ONE_STEP)
def test_trainer(trainer: str, peft: Any, seen: Seen) -> None:
    """OnlineDPO and PPO read what the model says at padding, in metrics: it stays, and looks on."""
    without = {"ref_model": None} if trainer == "PPO" and peft else {}
    steps = {} if trainer == "PPO" else {"max_steps": 2}
    check_noted(Case(trainer, {**ONE_STEP[trainer], **steps}, peft=peft, extra=lambda path: without))
    if trainer == "PPO":  # whose batches have a prompt once, and padding where an answer happens to end
        assert seen.rows
        assert not seen.padded
        return
    seen.assert_packed()
    assert any(rows.onlookers is not None for rows in seen.rows) == (trainer == "OnlineDPO")


def softcap_left_out(family: str) -> tuple[str, ...]:
    """The note where this version of transformers loads a model that has a softcap with sdpa, which leaves it out."""
    model = load(folder(family))
    return (SOFTCAP,) if family == "gemma2" and model.config._attn_implementation == "sdpa" else ()


FAMILIES = ("mistral", "gemma2", "gemma3-text", "phi3", "qwen3", "cohere")


def pairs() -> list[tuple[str, str]]:
    """Each family with each trainer on the newest TRL, and with PPO, which that has not, on 1.12; else one with each.

    `test_trainer` has each trainer on each TRL, and `TRL_TURBO_TEST_PACKED=1` each pair.
    """
    with_values = [family for family in FAMILIES if family != "cohere"]  # whose models of values PPO needs
    if Case("PPO").missing() or os.environ.get("TRL_TURBO_TEST_PACKED") == "1":
        trainers = [trainer for trainer in ONE_STEP if trainer != "PPO"]
        return [*itertools.product(FAMILIES, trainers), *((family, "PPO") for family in with_values)]
    if PACKED:
        return [("cohere", "GRPO"), *((family, "PPO") for family in with_values)]
    return list(zip(FAMILIES, itertools.cycle(ONE_STEP)))


#: What these read at padding is not there without it: OnlineDPO's metrics, an answer of PPO's that ended at once.
KEPT = dict.fromkeys(
    ((family, "OnlineDPO") for family in ("mistral", "gemma2", "gemma3-text")), "its sliding window leaves behind"
) | {("phi3", "PPO"): "before or between tokens"}


@pytest.mark.parametrize(("family", "trainer"), pairs())
def test_family(family: str, trainer: str, seen: Seen) -> None:
    """Windows of 16 tokens, alternating ones, norms of queries and keys, scaled scores, layers in parallel."""
    kept = KEPT.get((family, trainer))
    check_noted(Case(trainer, ONE_STEP[trainer], family=family), (kept, kept) if kept else softcap_left_out(family))
    if kept:
        assert seen.padded
    elif trainer == "PPO":
        assert seen.rows
        assert not seen.padded
    else:
        seen.assert_packed()


@pytest.mark.parametrize("attention", ["eager", "trl_turbo"])
def test_softcap(attention: str, seen: Seen) -> None:
    """Where it is applied: by eager code, and by our attention under its own name."""

    def case_of(name: str) -> Case:
        return Case("GRPO", {"max_steps": 1}, "gemma2", model=lambda path: load(path, attn_implementation=name))

    plain, *perturbed = stock(case_of("eager"))
    with patched() as path:
        ours = run(case_of(attention))
    path.assert_ours()
    assert not broken(plain, ours, perturbed)
    seen.assert_packed()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("peft", [None, lora()], ids=["full", "lora"])
def test_gradient_checkpointing(reentrant: bool, peft: Any, seen: Seen) -> None:
    """The layout reaches the layers when they are run again in backward."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    check_noted(Case("GRPO", {"max_steps": 1, "steps_per_generation": 1, **options}, peft=peft))
    seen.assert_packed()
    assert len(seen.rows) == 1
    checked = 2  # two layers, when the model was asked whether it may
    assert seen.calls == checked + 2 * 2, "two layers, forward and again in backward"


def test_reference_adapter(seen: Seen) -> None:
    check_noted(Case("GRPO", ONE_STEP["GRPO"], family="qwen2-untied", model=adapted(lora())))
    seen.assert_packed()


def test_adapter_on_the_head(seen: Seen) -> None:
    """TRL 1.15 and later refuse it; through our own forward there."""
    case = Case("OnlineDPO", {"max_steps": 1}, family="qwen2-untied", peft=lora("q_proj", "lm_head"))
    check_noted(case)
    seen.assert_packed()


@pytest.mark.parametrize("trainer", ["GRPO", "DPO", "OnlineDPO"])
def test_autocast(trainer: str, seen: Seen) -> None:
    unclipped = {"epsilon": 0.99, "epsilon_high": 100.0} if trainer == "GRPO" else {}
    check_noted(Case(trainer, {**ONE_STEP[trainer], "bf16": True, **unclipped}, dtype=torch.bfloat16, peft=lora()))
    seen.assert_packed()


@pytest.mark.parametrize("trainer", ["GRPO", "DPO"])
def test_patched_after_construction(trainer: str, seen: Seen) -> None:
    check_noted(Case(trainer, ONE_STEP[trainer]), late=True)
    seen.assert_packed()


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"mask_truncated_completions": True},
        {"top_entropy_quantile": 0.4},
        {"entropy_coef": 0.05},
        {"per_device_train_batch_size": 2, "num_generations": 2, "steps_per_generation": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_grpo_options(options: dict[str, Any], seen: Seen) -> None:
    """What reads per-token results or their shape; old TRL's LUSPO averages over padding."""
    check_noted(Case("GRPO", {"beta": 0.1, **options}))
    assert seen.shared


def test_chunks_of_tokens_are_fewer(seen: Seen) -> None:
    """The old and reference passes take the rows of two micro-batches at once where these fit."""
    options = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "num_generations": 4, "beta": 0.1}
    case = Case("GRPO", {"max_steps": 4, "num_iterations": 2, **options})
    check_noted(case)
    grown = [rows.shape[0] for rows in seen.rows]
    assert max(grown) > 2
    with patched():
        seen.rows.clear()
        with replaced.object(trl_turbo.patches.packing.chunks, "runs_packed", lambda *_: False):
            run(case)
    assert {rows.shape[0] for rows in seen.rows} == {2}


def test_quantised_model(seen: Seen) -> None:
    """QLoRA: nf4 under adapters that TRL casts to bf16, with checkpointing."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def quantised(path: str) -> Any:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        given = {"quantization_config": config, "dtype": torch.float32, "device_map": "cpu"}
        return AutoModelForCausalLM.from_pretrained(path, **given)

    checkpointed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    options = {**ONE_STEP["GRPO"], "epsilon": 0.99, "epsilon_high": 100.0, **checkpointed}
    check_noted(Case("GRPO", options, "llama", torch.bfloat16, lora(*ALL), quantised))
    seen.assert_packed()


def test_one_forward_of_both_passes(seen: Seen) -> None:
    """With `shared_pass` the old policy's log-probs come out of the training step's forward, which is packed once."""
    checkpointed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    options = {"gradient_accumulation_steps": 1, "steps_per_generation": 1, "max_steps": 2, "beta": 0.1}
    path = check_noted(Case("RLOO", {**options, **checkpointed}, peft=lora()))
    seen.assert_packed()
    assert [call.grad for call in path.kernel] == [True, False] * 2, "one pass with gradients, one of the reference"
    assert len(seen.rows) == 4


def test_wpo(seen: Seen) -> None:
    check_noted(Case("DPO", {"max_steps": 1, "use_weighting": True, "precompute_ref_log_probs": True}))
    seen.assert_packed()


def test_experts(seen: Seen) -> None:
    """The routers' load-balancing loss counts every token; without it experts are as packable as anything."""
    kept = check_noted(
        Case("GRPO", {"max_steps": 1, "router_aux_loss_coef": 0.5}, "qwen3-moe"), ("load-balancing loss",) * 2
    )
    assert not seen.rows
    assert kept.kernel
    seen.padded = 0

    def quiet(path: str) -> Any:
        return load(path, output_router_logits=False)

    options: dict[str, Any] = {"max_steps": 1}
    if "router_aux_loss_coef" in inspect.signature(trl.DPOConfig).parameters:
        options["router_aux_loss_coef"] = 0.0
    check_noted(Case("DPO", options, "qwen3-moe", model=quiet, extra=lambda path: {"ref_model": quiet(path)}))
    seen.assert_packed()


def test_dropout_is_not_shared(seen: Seen) -> None:
    """Each answer has a mask of its own in its prompt too. Nothing to compare with: the numbers are drawn otherwise."""
    case = Case("DPO", {"max_steps": 1, "disable_dropout": False}, peft=lora(lora_dropout=0.5))
    with patched() as path:
        run(case)
    assert any("activations are dropped out" in note for note in said(path))
    assert seen.rows
    assert not seen.shared


@pytest.mark.parametrize("trainer", ["GRPO", "DPO", "OnlineDPO", "PPO"])
def test_attention_on_the_padded_batch(trainer: str, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing off and attention on: the model runs on the padded batch, our attention on what is in it."""
    monkeypatch.setenv("TRL_TURBO_PACKING", "0")
    monkeypatch.setenv("TRL_TURBO_ATTENTION", "1")
    family = "gemma2" if trainer == "DPO" else "qwen2"
    check_noted(Case(trainer, ONE_STEP[trainer], family=family), softcap_left_out(family))
    assert not seen.rows
    assert seen.calls > 4


def test_packing_off_leaves_no_trace(seen: Seen) -> None:
    """After `unpatch()` a trainer that was packed goes on as stock, and its attention class is transformers' again."""
    case = Case("GRPO", {"max_steps": 1})
    with patched():
        trainer = build(case)
        train(trainer)
        kind = type(trainer.accelerator.unwrap_model(trainer.model).model.layers[0].self_attn)
        assert "trl_turbo" in transformers_attentions()
        assert "layout" in repr(kind.forward) or kind.forward.__code__.co_filename.endswith("_switch.py")
    count, calls = len(seen.rows), seen.calls
    train(trainer)
    assert (len(seen.rows), seen.calls) == (count, calls)
    assert "transformers" in kind.forward.__code__.co_filename
    assert "trl_turbo" not in transformers_attentions()


def transformers_attentions() -> list[str]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.valid_keys()


LEAKS: dict[str, Callable[[Any], Any]] = {
    "one-sequence": lambda segments: type(segments).build([segments.total]),
    "no-prefix": lambda segments: type(segments).build(segments.lengths),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_wrong_layout_is_caught(leak: str, seen: Seen) -> None:
    """Controls: rows that see each other, and answers that do not see their prompt, break the rule."""
    case = Case("GRPO", {"max_steps": 1})
    skip_unless_known(case)
    plain, *perturbed = stock(case)
    with patched():
        trainer = build(case)
        build_layout = passes.Layout

        def wrong(segments: Any, *args: Any) -> Any:
            return build_layout(LEAKS[leak](segments), *args)

        with replaced.object(passes, "Layout", wrong):
            ours = train(trainer)
    assert broken(plain, ours, perturbed)
