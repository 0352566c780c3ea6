"""What the five examples share: their arguments, and a tiny model where none is named."""

import argparse
import json
import tempfile
from typing import Any

import torch

WORDS = ["red", "green", "blue", "black", "white", "warm", "cold", "old", "new", "small"]


def parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="model name or folder; a tiny random Qwen2 is made if left out")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turbo", action="store_true", help="run the one line")
    args = parser.parse_args()
    args.model = args.model or make_tiny()
    return args


def make_tiny() -> str:
    from trl_turbo.demo.tiny import tiny_folder  # importing this patches nothing

    return tiny_folder()


def common(steps: int) -> dict[str, Any]:
    """Settings that have nothing to do with the algorithm."""
    cuda = torch.cuda.is_available()
    return {
        "output_dir": tempfile.mkdtemp(prefix="trl-example-"),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not cuda,
        "bf16": cuda,
        "disable_tqdm": True,
    }


def vowels(completions: list[str], **kwargs: object) -> list[float]:
    """A reward that needs no model: how many vowels an answer has."""
    return [float(sum(letter in "aeiou" for letter in completion)) for completion in completions]


def show(trainer: Any) -> None:
    """Print the losses and gradient norms of each step, one line of JSON a step."""
    for entry in trainer.state.log_history:
        kept = {key: value for key, value in entry.items() if "loss" in key or "grad_norm" in key}
        if kept and "train_runtime" not in entry:
            print(json.dumps({"step": entry.get("step"), **kept}))
