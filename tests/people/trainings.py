"""Short trainings of each trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [f"Say something {word}: " for word in ("red", "green", "blue", "black")]


def vowels(completions: list[Any], **kwargs: object) -> list[float]:
    """Differs from answer to answer."""
    return [float(sum(letter in "aeiou" for letter in str(text))) + len(str(text)) / 100 for text in completions]


def brief(completions: list[Any], **kwargs: object) -> list[float]:
    return [-len(str(text)) / 10 for text in completions]


def common(out: Path, steps: int, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 3,
        **options,
    }


def grpo(
    tiny: Path, out: Path, steps: int = 3, *, rewards: Any = (vowels, brief), prompts: Any = PROMPTS, **options: Any
) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    more = {name: options.pop(name) for name in ("peft_config", "rollout_func", "processing_class") if name in options}
    kind = options.pop("kind", GRPOTrainer)
    model = options.pop("model", str(tiny))
    settings = {"num_generations": 4, "max_completion_length": 12, **common(out, steps, **options)}
    return kind(
        model=model,
        reward_funcs=list(rewards),
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        args=GRPOConfig(**settings),
        **more,
    )


def rloo(tiny: Path, out: Path, steps: int = 3, **options: Any) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    settings = {"num_generations": 4, "max_completion_length": 12, **common(out, steps, **options)}
    data = Dataset.from_dict({"prompt": PROMPTS})
    return RLOOTrainer(model=str(tiny), reward_funcs=vowels, train_dataset=data, args=RLOOConfig(**settings))


def pairs() -> Dataset:
    return Dataset.from_list([{"prompt": p, "chosen": f"{p}it is.", "rejected": "no."} for p in PROMPTS])


def dpo(tiny: Path, out: Path, steps: int = 3, *, data: Dataset | None = None, **options: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    more = {name: options.pop(name) for name in ("peft_config", "processing_class") if name in options}
    settings = {"max_length": 64, **common(out, steps, **options)}
    return DPOTrainer(model=str(tiny), train_dataset=data or pairs(), args=DPOConfig(**settings), **more)


def online_dpo(tiny: Path, out: Path, steps: int = 3, **options: Any) -> Any:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    settings = {"max_new_tokens": 12, "max_length": 64, **common(out, steps, **options)}
    return OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny),
        processing_class=AutoTokenizer.from_pretrained(tiny, padding_side="left"),
        reward_funcs=vowels,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        args=OnlineDPOConfig(**settings),
    )


def ppo(tiny: Path, out: Path, steps: int = 3, **options: Any) -> Any:
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny, padding_side="left")
    data = Dataset.from_list([{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in PROMPTS])
    settings = {**common(out, -1, **options), "max_steps": -1, "total_episodes": 4 * steps, "response_length": 12}
    torch.manual_seed(3)  # the heads of the two are drawn
    score, value = (AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1) for _ in range(2))
    return PPOTrainer(
        args=PPOConfig(num_ppo_epochs=1, num_mini_batches=1, num_sample_generations=0, **settings),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(tiny),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny),
        reward_model=score,
        value_model=value,
        train_dataset=data,
        eval_dataset=data,
    )


TRAINERS: dict[str, Callable[..., Any]] = {"grpo": grpo, "rloo": rloo, "dpo": dpo, "online_dpo": online_dpo, "ppo": ppo}
