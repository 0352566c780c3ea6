"""PPO with a reward model and a value model, both tiny and random where no model is named."""

from datasets import Dataset
from tiny import WORDS, common, parse, show
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

try:
    from trl.experimental.ppo import PPOConfig, PPOTrainer
except ModuleNotFoundError as error:
    raise SystemExit("This TRL has no PPO: 1.12 was the last that did; pip install 'trl<1.13'.") from error

args = parse(__doc__)
if args.turbo:
    import trl_turbo

    trl_turbo.patch()  # the one line

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
prompts = [{"input_ids": tokenizer(f"Say something {word}: ")["input_ids"]} for word in WORDS]
settings = {**common(args.steps), "max_steps": -1}  # PPO counts episodes
trainer = PPOTrainer(
    args=PPOConfig(total_episodes=4 * args.steps, response_length=16, num_ppo_epochs=1, num_mini_batches=1, **settings),
    processing_class=tokenizer,
    model=AutoModelForCausalLM.from_pretrained(args.model),
    ref_model=AutoModelForCausalLM.from_pretrained(args.model),
    reward_model=AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1),
    value_model=AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1),
    train_dataset=Dataset.from_list(prompts),
    eval_dataset=Dataset.from_list(prompts),
)
trainer.train()
show(trainer)
