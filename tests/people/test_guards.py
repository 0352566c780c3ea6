"""The guards, by their words, in real trainings of a tiny model; each warns once, and each has a keyword."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

import trl_turbo
from trl_turbo import settings
from trl_turbo.patches.people.guards import STEPS, Streak

from .trainings import PROMPTS, brief, dpo, grpo, online_dpo, pairs, rloo, vowels

pytestmark = pytest.mark.trl

#: A model that writes neither padding nor its end-of-text token.
ENDLESS = {"suppress_tokens": [0, 1]}
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def base_tokenizer(tiny: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny, padding_side="left")
    tokenizer.chat_template = None
    return tokenizer


def same(completions: list[str], **kwargs: object) -> list[float]:
    return [1.0] * len(completions)


def drifted(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Rollouts whose log-probs are half a nat from those of the trainer, as from stale weights."""
    tokenizer = trainer.processing_class
    found: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for i, prompt in enumerate(prompts):
        prompt_ids = tokenizer(prompt)["input_ids"]
        completion_ids = [5 + (7 * i + j) % 60 for j in range(4 + i % 3)] + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt_ids + completion_ids])
        with torch.no_grad():
            logps = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        own = logps[len(prompt_ids) - 1 :].gather(-1, ids[0, len(prompt_ids) :, None])[:, 0]
        for name, value in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids)):
            found[name].append(value)
        found["logprobs"].append((own - 0.5).tolist())
    return found


class Syncs:
    """In the place of vLLM, whose part `rollout_func` has: there are no weights to sync."""

    mode = "server"

    def sync_weights(self) -> None:
        """Nothing."""


def drifting(tiny: Path, out: Path) -> Any:
    trainer = grpo(tiny, out, 4, rollout_func=drifted)
    # TRL takes log-probs of samples for vLLM's alone
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Syncs(), -1
    trainer.vllm_importance_sampling_correction = True
    return trainer


def run(make: Callable[[], Any], **raises: Any) -> None:
    error = raises.get("raises")
    if error is None:
        make().train()
    else:
        with pytest.raises(error):
            make().train()


def long_steps(**options: Any) -> dict[str, Any]:
    return {"steps": STEPS + 3, "learning_rate": 1e-6, **options}


#: Name of the guard, and of the case -> what is trained, what stock raises, and the words of the warning.
CASES: dict[tuple[str, str], tuple[Callable[[Path, Path], Any], Any, tuple[str, ...]]] = {
    ("chat_template", "grpo"): (
        lambda tiny, out: grpo(tiny, out, 1, prompts=CHATS, processing_class=base_tokenizer(tiny)),
        ValueError,
        ("has no chat template, as base models have none, and the data are chats", "clone_chat_template"),
    ),
    ("chat_template", "dpo"): (
        lambda tiny, out: dpo(tiny, out, 1, data=chats(), processing_class=base_tokenizer(tiny)),
        ValueError,
        ("has no chat template, as base models have none", "take the instruct model"),
    ),
    ("constant_reward", "grpo"): (
        lambda tiny, out: grpo(tiny, out, rewards=(same,), **long_steps()),
        None,
        (f"the reward has been the same in every group for {STEPS} steps", "give partial rewards"),
    ),
    ("constant_reward", "rloo"): (
        lambda tiny, out: constant_rloo(tiny, out),
        None,
        ("the reward has been the same in every group for", "trl_turbo.samples(trainer) shows them"),
    ),
    ("truncated", "grpo"): (
        lambda tiny, out: grpo(tiny, out, generation_kwargs=ENDLESS, **long_steps()),
        None,
        (
            f"no completion has come to its end for {STEPS} steps",
            "raise max_completion_length (it is 12)",
            "eos_token ('<eos>')",
        ),
    ),
    ("truncated", "online_dpo"): (
        lambda tiny, out: endless_online_dpo(tiny, out),
        None,
        ("no completion has come to its end", "raise max_new_tokens (it is 12)"),
    ),
    ("learning_rate", "too small"): (
        lambda tiny, out: grpo(tiny, out, 1, peft_config=lora(), learning_rate=1e-6),
        None,
        ("learning_rate=1e-06 is small for LoRA: TRL's default, 1e-06, is for training all weights", "try 1e-05"),
    ),
    ("learning_rate", "too large"): (
        lambda tiny, out: dpo(tiny, out, 1, peft_config=lora(), learning_rate=1e-2),
        None,
        ("learning_rate=0.01 is large for LoRA", "an adapter takes about 10 times that; try 1e-05"),
    ),
    ("group_size", "grpo"): (
        lambda tiny, out: grpo(tiny, out, 1, num_generations=3),
        ValueError,
        (
            "num_generations=3 does not divide the 4 completions that are sampled together",
            "set num_generations=2 or 4, or per_device_train_batch_size=6",
        ),
    ),
    ("group_size", "rloo"): (
        lambda tiny, out: rloo(tiny, out, 1, num_generations=3),
        ValueError,
        ("num_generations=3 does not divide the 4 completions",),
    ),
    ("logp_drift", "grpo"): (
        drifting,
        None,
        ("the log-probs of rollouts are 0.50 nats a token away from the trainer's", "weights that are not synced"),
    ),
    ("context", "grpo"): (
        lambda tiny, out: grpo(tiny, out, 1, prompts=[*PROMPTS, "a" * 1020]),
        None,
        (
            "the longest prompt has 1020 tokens, max_completion_length is 12",
            "the model's max_position_embeddings is 1024",
            "drop long prompts",
        ),
    ),
    ("context", "grpo-chats"): (
        lambda tiny, out: grpo(tiny, out, 1, prompts=[*CHATS, [{"role": "user", "content": "a" * 1000}]]),
        None,
        ("the longest prompt has 10", "max_completion_length is 12"),
    ),
    ("context", "dpo"): (
        lambda tiny, out: dpo(tiny, out, 1, data=long_pairs(), max_length=None),
        None,
        (
            "the longest prompt has 1100 tokens, and the model's max_position_embeddings is 1024",
            "set max_length so that",
        ),
    ),
}


def chats() -> Dataset:
    def chat(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return Dataset.from_list(
        [
            {
                "prompt": chat("user", row["prompt"]),
                "chosen": chat("assistant", row["chosen"]),
                "rejected": chat("assistant", row["rejected"]),
            }
            for row in pairs()
        ]
    )


def long_pairs() -> Dataset:
    return Dataset.from_list([{"prompt": "a" * 1100, "chosen": "yes.", "rejected": "no."}] * 4)


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")


def constant_rloo(tiny: Path, out: Path) -> Any:
    trainer = rloo(tiny, out, STEPS + 3, learning_rate=1e-6)
    trainer.reward_funcs = [same]
    return trainer


def endless_online_dpo(tiny: Path, out: Path) -> Any:
    trainer = online_dpo(tiny, out, STEPS + 3, learning_rate=1e-6)
    trainer.generation_config.suppress_tokens = ENDLESS["suppress_tokens"]
    return trainer


@pytest.mark.parametrize(("guard", "case"), CASES, ids=lambda part: part)
def test_warns_once_with_the_remedy(guard: str, case: str, tiny: Path, tmp_path: Path, caplog) -> None:
    make, raises, words = CASES[guard, case]
    report = trl_turbo.patch(verbose=False, dashboard=False)
    with caplog.at_level(logging.WARNING, "trl_turbo"):
        run(lambda: make(tiny, tmp_path), raises=raises)
    found = [note.text for note in report.notes if note.feature == "guards" and f"guard_{guard}=False" in note.text]
    assert len(found) == 1, [note.text for note in report.notes]
    for part in words:
        assert part in found[0]
    lines = [record for record in caplog.records if found[0] in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].levelno == logging.WARNING
    assert "\n" not in lines[0].getMessage()


@pytest.mark.parametrize(("guard", "case"), CASES, ids=lambda part: part)
def test_its_keyword_turns_it_off(guard: str, case: str, tiny: Path, tmp_path: Path) -> None:
    make, raises, _ = CASES[guard, case]
    report = trl_turbo.patch(verbose=False, dashboard=False, **{f"guard_{guard}": False})
    run(lambda: make(tiny, tmp_path), raises=raises)
    assert not any(f"guard_{guard}" in note.text for note in report.notes)


def test_every_guard_is_tested_and_is_a_keyword() -> None:
    assert {guard for guard, _ in CASES} == set(settings.GUARDS)


@pytest.mark.parametrize("way", ["keyword", "environment", "one in the environment"])
def test_all_are_off_at_once(way: str, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    keywords = {"guards": False} if way == "keyword" else {}
    if way == "environment":
        monkeypatch.setenv("TRL_TURBO_GUARDS", "0")
    elif way != "keyword":
        monkeypatch.setenv("TRL_TURBO_GUARD_LEARNING_RATE", "0")
    report = trl_turbo.patch(verbose=False, dashboard=False, **keywords)
    grpo(tiny, tmp_path, 1, peft_config=lora(), learning_rate=1e-6).train()
    assert not report.notes


def test_a_good_training_has_no_warning(tiny: Path, tmp_path: Path) -> None:
    report = trl_turbo.patch(verbose=False, dashboard=False)
    sizes = {"per_device_train_batch_size": 8, "max_completion_length": 24}  # so that some completion ends by chance
    grpo(tiny, tmp_path, STEPS + 2, rewards=(vowels, brief), peft_config=lora(), learning_rate=1e-5, **sizes).train()
    assert not report.notes


def test_a_word_that_is_neither_on_nor_off() -> None:
    with pytest.raises(ValueError, match=r"patch\(guard_context='maybe'\) is not known; set on or off"):
        trl_turbo.patch(guard_context="maybe")


def test_a_streak_is_of_steps_and_of_logs() -> None:
    every_step, rare = Streak(10, 3), Streak(10, 3)
    assert [every_step.see(True, step) for step in range(1, 12)] == [None] * 9 + [10, 11]
    assert [rare.see(True, step) for step in (10, 20, 30)] == [None, None, 30]
    broken = Streak(2, 2)
    assert [broken.see(holds, step) for step, holds in enumerate([True, False, True, True], 1)] == [None, None, None, 2]
