"""DPO on pairs of answers: the one that repeats the word asked for is chosen."""

from datasets import Dataset
from tiny import WORDS, common, parse, show
from trl import DPOConfig, DPOTrainer

args = parse(__doc__)
if args.turbo:
    import trl_turbo

    trl_turbo.patch()  # the one line

pairs = [
    {"prompt": f"Say something {word}: ", "chosen": f"{word} it is.", "rejected": f"{other} it is."}
    for word in WORDS
    for other in WORDS
    if word != other
]
trainer = DPOTrainer(
    model=args.model, train_dataset=Dataset.from_list(pairs), args=DPOConfig(max_length=64, **common(args.steps))
)
trainer.train()
show(trainer)
