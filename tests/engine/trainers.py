"""Short trainings with a colocated vLLM, on a tiny model and the CPU."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from tests.engine.models import quantised, saved


def liked(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [sum(token < 64 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def dataset() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": ["12+7=", "a longer prompt 3*4=", "x", "8-5="] * 8})


def settings(config_class: type, out: Path, **more: Any) -> Any:
    known = inspect.signature(config_class).parameters
    wanted = {
        "output_dir": str(out),
        "per_device_train_batch_size": 8,
        "num_generations": 8,
        "max_completion_length": 8,
        "max_steps": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "seed": 3,
        **more,
    }
    return config_class(**{name: value for name, value in wanted.items() if name in known})


def trainer(
    kind: str,
    tmp: Path,
    *,
    peft_config: Any = None,
    four_bit: bool = False,
    initializer_range: float = 0.05,
    loaded: tuple[Any, Any] | None = None,
    **more: Any,
) -> Any:
    """A GRPO, RLOO or OnlineDPO trainer, untrained; `loaded` is the model and the tokenizer that it takes."""
    from transformers import AutoTokenizer

    if loaded is None:
        folder = tmp / "model"
        if four_bit:
            model = quantised(folder, "qwen2_tied", initializer_range=initializer_range)
        else:
            model, _ = saved(folder, "qwen2_tied", initializer_range=initializer_range)
        loaded = model, AutoTokenizer.from_pretrained(folder)
    if kind == "OnlineDPO":
        from trl.experimental.online_dpo import OnlineDPOConfig as Config
        from trl.experimental.online_dpo import OnlineDPOTrainer as Trainer

        more = {"max_new_tokens": 8, "max_length": 64, "missing_eos_penalty": 1.0, **more}
    else:
        import trl

        Trainer, Config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    return Trainer(
        model=loaded[0],
        reward_funcs=liked,
        args=settings(Config, tmp / "out", **more),
        train_dataset=dataset(),
        processing_class=loaded[1],
        peft_config=peft_config,
    )


def metric(trained: Any, name: str) -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


def ppo(tmp: Path, *, peft_config: Any = None, generation: dict[str, Any] | None = None, **more: Any) -> Any:
    """A PPO trainer, untrained. `generation` goes into the policy's own generation configuration."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    model, folder = saved(tmp / "model", "qwen2_tied")
    model.generation_config.update(**(generation or {}))
    words = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(2)  # their heads are made here
    scorers = [
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32) for _ in range(2)
    ]
    data = Dataset.from_dict({"input_ids": [words(text)["input_ids"] for text in dataset()["prompt"]]})
    wanted = {
        "response_length": 8,
        "num_ppo_epochs": 1,
        "num_mini_batches": 1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "local_rollout_forward_batch_size": 3,
        "total_episodes": 16,
        "num_sample_generations": 0,
        "missing_eos_penalty": 1.0,
        "stop_token": "eos",
        "temperature": 0.7,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",  # a second `train()` goes on where the first one ended
        "max_steps": -1,
        **more,
    }
    return PPOTrainer(
        args=settings(PPOConfig, tmp / "out", **wanted),
        processing_class=words,
        model=model,
        ref_model=None if peft_config else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_model=scorers[0],
        value_model=scorers[1],
        train_dataset=data,
        eval_dataset=data,
        peft_config=peft_config,
    )
