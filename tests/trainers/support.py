"""Run one short training of each trainer on a tiny model and keep all that can be compared."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

from trl_turbo.demo.tiny import make_model, make_tokenizer

VOCAB = 211  # a prime, so that no other dimension of a run is taken for it
WORDS = ("12+7=", "a longer prompt 3*4=", "x", "8-5=", "q: 2+2 a:", "99/3=", "zz", "7*8=")


@dataclass
class Outcome:
    """What one run left behind."""

    logs: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    grads: dict[str, torch.Tensor] = field(default_factory=dict)
    trainer: Any = None


@pytest.fixture(autouse=True)
def _collected():
    yield
    gc.collect()


def tiny(tmp: Path, **config: Any) -> str:
    """A saved model, so that trainers load it the real way. Not tied and with spread-out logits by default."""
    folder = tmp / "model"
    if not folder.exists():
        tokenizer = make_tokenizer(VOCAB)
        settings = {"tie_word_embeddings": True, "initializer_range": 0.2, **config}
        model = make_model(tokenizer, hidden_size=64, num_layers=2, seed=3, **settings)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def tokenizer_of(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def fits(config_class: type, **arguments: Any) -> dict[str, Any]:
    """The arguments this version's config knows; what it does not know must be at its default to be dropped."""
    known = inspect.signature(config_class).parameters
    return {name: value for name, value in arguments.items() if name in known}


def knows(config_class: type, *names: str) -> bool:
    return all(name in inspect.signature(config_class).parameters for name in names)


class _Watch(TrainerCallback):
    """Keeps the gradients of the last optimizer step."""

    def __init__(self) -> None:
        self.grads: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


VOLATILE = ("time", "runtime", "per_second", "eps", "epoch", "num_input_tokens", "mfu", "flos")


def outcome(trainer: Any, watch: _Watch | None = None) -> Outcome:
    logs = [
        {k: float(v) for k, v in entry.items() if isinstance(v, (int, float)) and not any(w in k for w in VOLATILE)}
        for entry in trainer.state.log_history
    ]
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {n: p.detach().float().clone() for n, p in model.named_parameters()}
    return Outcome(logs, weights, watch.grads if watch else {}, trainer)


def parity_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Differs from answer to answer, so that advantages are not zero."""
    return [sum((7 * t) % 5 for t in ids) / max(1, len(ids)) for ids in completion_ids]


COMMON = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "disable_tqdm": True,
    "seed": 11,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def run_policy(
    kind: str,
    tmp: Path,
    *,
    peft_config: Any = None,
    model: Any = None,
    change: Callable[[Any], None] | None = None,
    before_train: Callable[[Any], None] | None = None,
    **config: Any,
) -> Outcome:
    """GRPO or RLOO."""
    import trl

    trainer_class, config_class = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    path = tiny(tmp)
    model = copy.deepcopy(model) if model is not None else path
    arguments = {
        **COMMON,
        "output_dir": str(tmp / "out"),
        "num_generations": 4,
        "max_completion_length": 8,
        "temperature": 0.9,
        **config,
    }
    unknown = set(arguments) - set(inspect.signature(config_class).parameters)
    assert not unknown, f"{config_class.__name__} of this TRL does not know {unknown}"
    set_seed(5)
    watch = _Watch()
    trainer = trainer_class(
        model=model,
        reward_funcs=parity_reward,
        args=config_class(**arguments),
        train_dataset=Dataset.from_dict({"prompt": list(WORDS)}),
        processing_class=tokenizer_of(path),
        peft_config=copy.deepcopy(peft_config),
        callbacks=[watch],
    )
    if change is not None:
        change(trainer)
    if before_train is not None:
        before_train(trainer)
    set_seed(7)
    trainer.train()
    return outcome(trainer, watch)


def preference_data() -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": list(WORDS),
            "chosen": [f" good answer {i}" for i in range(len(WORDS))],
            "rejected": [f" bad {i * i}" for i in range(len(WORDS))],
        }
    )


def run_dpo(
    tmp: Path,
    *,
    peft_config: Any = None,
    model: Any = None,
    ref_model: Any = None,
    before_train: Callable[[Any], None] | None = None,
    **config: Any,
) -> Outcome:
    import trl

    path = tiny(tmp)
    arguments = {**COMMON, "output_dir": str(tmp / "out"), **config}
    unknown = set(arguments) - set(inspect.signature(trl.DPOConfig).parameters)
    assert not unknown, f"DPOConfig of this TRL does not know {unknown}"
    set_seed(5)
    watch = _Watch()
    trainer = trl.DPOTrainer(
        model=copy.deepcopy(model) if model is not None else AutoModelForCausalLM.from_pretrained(path),
        ref_model=copy.deepcopy(ref_model),
        args=trl.DPOConfig(**arguments),
        train_dataset=preference_data(),
        processing_class=tokenizer_of(path),
        peft_config=copy.deepcopy(peft_config),
        callbacks=[watch],
    )
    if before_train is not None:
        before_train(trainer)
    set_seed(7)
    trainer.train()
    return outcome(trainer, watch)


def run_online_dpo(tmp: Path, *, peft_config: Any = None, **config: Any) -> Outcome:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    path = tiny(tmp)
    arguments = {
        **COMMON,
        "output_dir": str(tmp / "out"),
        "max_new_tokens": 8,
        "max_length": 64,
        "temperature": 0.9,
        "missing_eos_penalty": 1.0,
        **config,
    }
    set_seed(5)
    watch = _Watch()
    trainer = OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path),
        reward_funcs=parity_reward,
        args=OnlineDPOConfig(**fits(OnlineDPOConfig, **arguments)),
        train_dataset=Dataset.from_dict({"prompt": list(WORDS)}),
        processing_class=tokenizer_of(path),
        peft_config=copy.deepcopy(peft_config),
        callbacks=[watch],
    )
    set_seed(7)
    trainer.train()
    return outcome(trainer, watch)


def run_ppo(tmp: Path, *, peft_config: Any = None, **config: Any) -> Outcome:
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    path = tiny(tmp)
    tokenizer = tokenizer_of(path)
    arguments = {
        **COMMON,
        "output_dir": str(tmp / "out"),
        "response_length": 8,
        "num_ppo_epochs": 2,
        "num_mini_batches": 1,
        "gradient_accumulation_steps": 2,
        "total_episodes": 16,
        "local_rollout_forward_batch_size": 4,
        "num_sample_generations": 0,
        "missing_eos_penalty": 1.0,
        "stop_token": "eos",
        "kl_coef": 0.1,
        "temperature": 0.7,
        **config,
    }
    arguments.pop("max_steps")
    set_seed(5)
    data = Dataset.from_dict({"input_ids": [tokenizer(w)["input_ids"] for w in WORDS]})
    heads = [
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, pad_token_id=tokenizer.pad_token_id)
        for _ in range(2)
    ]
    trainer = PPOTrainer(
        args=PPOConfig(**fits(PPOConfig, **arguments)),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(path),
        ref_model=None if peft_config is not None else AutoModelForCausalLM.from_pretrained(path),
        reward_model=heads[0],
        value_model=heads[1],
        train_dataset=data,
        peft_config=copy.deepcopy(peft_config),
    )
    set_seed(7)
    trainer.train()
    return outcome(trainer)
