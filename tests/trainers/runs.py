"""One short training of any of the five trainers, watched from outside."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import trl
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PrinterCallback, set_seed

from .models import VOCAB, folder, load, load_tokenizer, scratch
from .rule import Outcome, ulp
from .sharded import whole

WORDS = ("12+7=", "a longer prompt 3*4=", "x", "8-5=", "q: 2+2 a:", "99/3=", "zz", "7*8=")
# Not reproducible, or rounded where it is logged (the loss: it is taken from every training step instead)
VOLATILE = ("time", "runtime", "per_second", "eps", "mfu", "flos")
ROUNDED = ("loss",)

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "disable_tqdm": True,
    "seed": 11,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
POLICY = {"num_generations": 4, "max_completion_length": 8, "steps_per_generation": 2, "temperature": 0.9}
OPTIONS: dict[str, dict[str, Any]] = {
    "GRPO": POLICY,
    "RLOO": POLICY,
    "DPO": {"max_length": 64},
    "OnlineDPO": {"max_new_tokens": 8, "max_length": 64, "temperature": 0.9, "missing_eos_penalty": 1.0},
    "PPO": {
        "max_steps": -1,
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
    },
}


def classes(trainer: str) -> tuple[type, type]:
    """The trainer and its configuration. PPO raises ImportError where this TRL has none."""
    if trainer == "OnlineDPO":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        return OnlineDPOTrainer, OnlineDPOConfig
    if trainer == "PPO":
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        return PPOTrainer, PPOConfig
    return getattr(trl, f"{trainer}Trainer"), getattr(trl, f"{trainer}Config")


@dataclass(eq=False)
class Case:
    """A training to compare: everything but the weights it starts from, and who scores the tokens.

    Attributes:
        trainer: GRPO, RLOO, DPO, OnlineDPO or PPO.
        options: Of its configuration.
        family: Of `models.FAMILIES`.
        dtype: Whose unit in the last place perturbed runs move the weights by.
        peft: Makes the `peft_config`.
        model: Makes the trainer's model from the folder; by default the trainer loads it itself.
        extra: Makes further arguments of the trainer from the folder.
        subclass: Makes the trainer's class from TRL's.
        prepare: Changes the trainer before it trains.
        canned: Whether completions are given, not sampled: then a run that differs in its last place trains on the same
            tokens, whatever the precision.
    """

    trainer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    family: str = "qwen2"
    dtype: torch.dtype = torch.float32
    peft: Callable[[], Any] | None = None
    model: Callable[[str], Any] | None = None
    extra: Callable[[str], dict[str, Any]] = lambda path: {}
    subclass: Callable[[type], type] = lambda trainer: trainer
    prepare: Callable[[Any], None] = lambda trainer: None
    canned: bool = True

    def missing(self) -> str:
        """Why this TRL cannot run it, or an empty string."""
        try:
            _, config = classes(self.trainer)
        except ImportError:
            return f"TRL {trl.__version__} has no {self.trainer}"
        unknown = set(self.options) - set(inspect.signature(config).parameters)
        return f"TRL {trl.__version__}: {config.__name__} has no {', '.join(sorted(unknown))}" if unknown else ""


def forget_precision() -> None:
    """Mixed precision outlives a run: in accelerate's state, and with transformers 4 in the environment."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)


def build(case: Case, variant: str = "plain") -> Any:
    """The trainer, constructed and not yet trained."""
    forget_precision()
    path = folder(case.family, variant, ulp(case.dtype))
    trainer_class, config_class = classes(case.trainer)
    known = inspect.signature(config_class).parameters
    defaults = {k: v for k, v in {**COMMON, **OPTIONS[case.trainer]}.items() if k in known}
    config = config_class(output_dir=scratch("out"), **{**defaults, **case.options})
    set_seed(5)
    arguments = {
        "model": path if case.model is None else case.model(path),
        "args": config,
        "processing_class": load_tokenizer(path),
        "peft_config": None if case.peft is None else case.peft(),
        **DATA[case.trainer](path, config),
        **case.extra(path),
    }
    trainer = case.subclass(trainer_class)(**arguments)
    trainer.remove_callback(PrinterCallback)
    if case.canned and case.trainer in ("GRPO", "RLOO", "OnlineDPO"):
        trainer.accelerator.unwrap_model(trainer.model).generate = Canned()
    case.prepare(trainer)
    return trainer


def train(trainer: Any, **kwargs: Any) -> Outcome:
    """Train, and keep every loss, metric, gradient norm, the last gradients and what was added to the weights."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    before = {name: whole(parameter) for name, parameter in model.named_parameters()}
    seen = Outcome({"training loss": [], "norm of the gradient": []}, {"gradient": {}, "update": {}})

    def stepping(optimizer: Any, *_: Any) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = {names[id(p)]: whole(p.grad) for p in trained if id(p) in names}  # ZeRO steps flat parts of its own
        norms = [grad.double().norm() for grad in grads.values()]
        seen.series["norm of the gradient"].append(torch.stack(norms).norm().item() if norms else 0.0)
        seen.tensors["gradient"] = grads

    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        seen.series["training loss"].append(loss.item())
        return loss

    trainer.training_step = training_step
    handle = register_optimizer_step_pre_hook(stepping)
    try:
        set_seed(7)
        trainer.train(**kwargs)
    finally:
        handle.remove()
        trainer.training_step = step
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if isinstance(value, (int, float)) and name not in ROUNDED and not any(word in name for word in VOLATILE):
                seen.series.setdefault(name, []).append(float(value))
    for name, parameter in model.named_parameters():
        after = whole(parameter).double()
        update = after - before[name].double()
        if parameter.requires_grad:
            seen.tensors["update"][name] = update
            seen.stored[name] = after.norm().item()
        else:
            assert not update.any(), f"{name} is frozen and was changed"
    return seen


def run(case: Case, variant: str = "plain") -> Outcome:
    return train(build(case, variant))


class Canned:
    """Stands for `generate`: the same prompts get the same ragged completions, some ended, some cut off."""

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(input_ids.sum()))
        drawn = torch.randint(3, VOCAB, (len(input_ids), 8), generator=generator)
        for row, end in enumerate(torch.randint(2, 12, (len(input_ids),), generator=generator).tolist()):
            drawn[row, end : end + 1] = 1
            drawn[row, end + 1 :] = 0
        return torch.cat([input_ids, drawn.to(input_ids.device)], 1)


def parity_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Differs from answer to answer, so that advantages are not zero."""
    return [sum((7 * t) % 5 for t in ids) / max(1, len(ids)) for ids in completion_ids]


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": list(WORDS)})


def preferences() -> Dataset:
    count = range(len(WORDS))
    chosen, rejected = [f" good answer {i}" for i in count], [f" bad {i * i}" for i in count]
    return Dataset.from_dict({"prompt": list(WORDS), "chosen": chosen, "rejected": rejected})


def _data(make: Callable[[], Dataset], path: str, config: Any) -> dict[str, Any]:
    evaluates = config.eval_strategy != "no"
    rewards = {} if make is preferences else {"reward_funcs": parity_reward}
    return {"train_dataset": make(), "eval_dataset": make() if evaluates else None, **rewards}


def _ppo_data(path: str, config: Any) -> dict[str, Any]:
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(path)
    scorers = [
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, pad_token_id=0, dtype=torch.float32)
        for _ in range(2)
    ]
    data = Dataset.from_dict({"input_ids": [tokenizer(word)["input_ids"] for word in WORDS]})
    return {
        "model": load(path),
        "ref_model": load(path),
        "reward_model": scorers[0],
        "value_model": scorers[1],
        "train_dataset": data,
        "eval_dataset": data,
    }


DATA: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "GRPO": partial(_data, prompts),
    "RLOO": partial(_data, prompts),
    "DPO": partial(_data, preferences),
    "OnlineDPO": partial(_data, prompts),
    "PPO": _ppo_data,
}
