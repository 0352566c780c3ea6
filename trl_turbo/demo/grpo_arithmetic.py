"""A plain TRL script: GRPO teaches a model to add. It knows nothing of the library that ships it."""

import argparse

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--output_dir", required=True)
parser.add_argument("--max_steps", type=int, default=250)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--largest", type=int, default=19, help="the largest number to add")
parser.add_argument("--brevity", type=float, default=0.0, help="weight of the reward for short answers")
parser.add_argument("--per_device_train_batch_size", type=int, default=192)
parser.add_argument("--num_generations", type=int, default=8)
parser.add_argument("--max_completion_length", type=int, default=4)
parser.add_argument("--learning_rate", type=float, default=4e-4)
args = parser.parse_args()

numbers = range(args.largest + 1)
dataset = Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in numbers for b in numbers])


def is_right(completions: list[str], answer: list[str], **kwargs: object) -> list[float]:
    """1 for the right number and nothing else, 0 for anything else."""
    return [float(completion == expected) for completion, expected in zip(completions, answer, strict=True)]


def is_brief(completions: list[str], **kwargs: object) -> list[float]:
    """Minus the number of characters."""
    return [-float(len(completion)) for completion in completions]


trainer = GRPOTrainer(
    model=args.model,
    reward_funcs=[is_right, is_brief],
    train_dataset=dataset,
    args=GRPOConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.per_device_train_batch_size,
        num_generations=args.num_generations,
        max_completion_length=args.max_completion_length,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        reward_weights=[1.0, args.brevity],
        seed=args.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
)
trainer.train()
trainer.save_state()
