"""GRPO with a rule for a reward: answers with many vowels are good."""

from datasets import Dataset
from tiny import WORDS, common, parse, show, vowels
from trl import GRPOConfig, GRPOTrainer

args = parse(__doc__)
if args.turbo:
    import trl_turbo

    trl_turbo.patch()  # the one line

trainer = GRPOTrainer(
    model=args.model,
    reward_funcs=vowels,
    train_dataset=Dataset.from_dict({"prompt": [f"Say something {word}: " for word in WORDS]}),
    args=GRPOConfig(num_generations=4, max_completion_length=16, **common(args.steps)),
)
trainer.train()
show(trainer)
