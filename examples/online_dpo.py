"""OnlineDPO: of two sampled answers, the one with more vowels is preferred."""

from datasets import Dataset
from tiny import WORDS, common, parse, show, vowels
from transformers import AutoModelForCausalLM, AutoTokenizer

try:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
except ModuleNotFoundError as error:
    raise SystemExit(f"OnlineDPO cannot be imported: {error.name} is missing; pip install it.") from error

args = parse(__doc__)
if args.turbo:
    import trl_turbo

    trl_turbo.patch()  # the one line

trainer = OnlineDPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(args.model),
    processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
    reward_funcs=vowels,
    train_dataset=Dataset.from_dict({"prompt": [f"Say something {word}: " for word in WORDS]}),
    args=OnlineDPOConfig(max_new_tokens=16, max_length=64, **common(args.steps)),
)
trainer.train()
show(trainer)
