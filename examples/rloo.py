"""RLOO with a rule for a reward: answers with many vowels are good."""

from datasets import Dataset
from tiny import WORDS, common, parse, show, vowels
from trl import RLOOConfig, RLOOTrainer

args = parse(__doc__)
if args.turbo:
    import trl_turbo

    trl_turbo.patch()  # the one line

trainer = RLOOTrainer(
    model=args.model,
    reward_funcs=vowels,
    train_dataset=Dataset.from_dict({"prompt": [f"Say something {word}: " for word in WORDS]}),
    args=RLOOConfig(num_generations=4, max_completion_length=16, **common(args.steps)),
)
trainer.train()
show(trainer)
