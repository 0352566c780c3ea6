"""One training of any trainer in a process of its own, for `benchmarks.trainers`: prints JSON after `RESULT`.

Fixed lengths and one seed, so that every contestant does the same work. The script is TRL's; `--before` runs first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from typing import Any

from benchmarks.grpo_run import Peak, capped, load, odd_tokens, plan_of, prompts

TRAINERS = ("grpo", "rloo", "dpo", "online_dpo", "ppo")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", required=True, choices=TRAINERS)
    parser.add_argument("--model", required=True, help="folder of a model with its tokenizer")
    parser.add_argument("--before", default="", help="Python that runs before TRL is imported")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--length", type=int, default=4096, help="tokens of prompt and completion together")
    parser.add_argument("--micro", type=int, default=2, help="rows of a micro-batch; of DPO's and OnlineDPO's, pairs")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA adapter; 0 trains all weights")
    parser.add_argument("--share", type=float, default=0.1, help="vllm_gpu_memory_utilization")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--no-vllm", action="store_true", help="sample with transformers")
    parser.add_argument("--cap-gb", type=float, help="let torch take so much and no more, and vLLM its share of it")
    return parser.parse_args()


def common(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of every trainer."""
    return {
        "output_dir": "/tmp/trl_turbo_bench",
        "per_device_train_batch_size": args.micro,
        "gradient_accumulation_steps": 1,
        "max_steps": args.steps,
        "learning_rate": 1e-5,
        "bf16": True,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
    }


def sampling(args: argparse.Namespace, share: float) -> dict[str, Any]:
    """Settings of those that sample with vLLM."""
    if args.no_vllm:
        return {"use_vllm": False}
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": share,
        "generation_kwargs": {"ignore_eos": True},
    }


def build(args: argparse.Namespace, share: float, callback: Any) -> Any:
    """The trainer, constructed."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    completion = args.length - args.prompt
    texts = prompts(tokenizer, args.prompt)
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = load(args.model, args.load_in_4bit)
    # PPO's generation is transformers' own, which would end where the random model says so
    model.generation_config.eos_token_id = None if args.trainer == "ppo" else model.generation_config.eos_token_id
    parts: dict[str, Any] = {
        "model": model,
        "processing_class": tokenizer,
        "peft_config": lora if args.rank else None,
        "callbacks": [callback],
        "train_dataset": Dataset.from_dict({"prompt": texts}),
    }
    if args.trainer in ("grpo", "rloo"):
        import trl

        name = args.trainer.upper()
        config = getattr(trl, f"{name}Config")(
            **common(args),
            **sampling(args, share),
            num_generations=args.micro,
            max_completion_length=completion,
            use_liger_kernel=args.liger,
            **({} if args.no_vllm else {"vllm_max_model_length": args.length + 16}),
        )
        return getattr(trl, f"{name}Trainer")(args=config, reward_funcs=odd_tokens, **parts)
    if args.trainer == "dpo":
        from trl import DPOConfig, DPOTrainer

        answers = prompts(tokenizer, completion)
        random.Random(1).shuffle(answers)
        parts["train_dataset"] = Dataset.from_dict({"prompt": texts, "chosen": answers, "rejected": answers[::-1]})
        config = DPOConfig(**common(args), max_length=args.length, use_liger_kernel=args.liger)
        return DPOTrainer(args=config, **parts)
    if args.trainer == "online_dpo":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        config = OnlineDPOConfig(
            **common(args), **sampling(args, share), max_new_tokens=completion, max_length=args.length
        )
        return OnlineDPOTrainer(args=config, reward_funcs=odd_tokens, **parts)
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    scorers = [
        AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=torch.bfloat16)
        for _ in range(2)
    ]
    settings = {**common(args), "max_steps": -1}
    config = PPOConfig(
        **settings,
        response_length=completion,
        num_ppo_epochs=1,
        num_mini_batches=1,
        total_episodes=args.steps * args.micro,
        local_rollout_forward_batch_size=args.micro,
        num_sample_generations=0,
    )
    parts["train_dataset"] = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})
    return PPOTrainer(
        args=config,
        ref_model=None,
        reward_model=scorers[0],
        value_model=scorers[1],
        eval_dataset=parts["train_dataset"],
        **parts,
    )


def main() -> None:
    args = arguments()
    exec(args.before)
    import torch
    from transformers import TrainerCallback

    peak = Peak()
    share = args.share * capped(args.cap_gb)
    times: list[float] = []

    class Clock(TrainerCallback):
        """PPO's loop has no begin of a step: a step is from the end of one to that of the next."""

        last: float | None = None

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            now = time.perf_counter()
            times.append(now - self.last)
            self.last = now

    trainer = build(args, share, Clock())
    loaded = peak.now()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    top = peak.stop()
    planned, phases = plan_of(trainer)
    history = trainer.state.log_history
    gaps = [entry[name] for entry in history for name in entry if name.endswith("sampling_logp_difference/mean")]
    result = {
        "peak_gb": top / 2**30,
        "loaded_gb": loaded / 2**30,
        "torch_gb": torch.cuda.max_memory_allocated() / 2**30,
        "step_s": statistics.median(times[len(times) // 2 :]),
        "steps_s": times,
        "logp_gap_largest": max(gaps, default=None),
        "loss": [entry["loss"] for entry in history if "loss" in entry][:4],
        "in_use_at_first_gb": peak.base / 2**30,
        "plan": planned,
        "phases": phases,
    }
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)  # vLLM's teardown takes longer than some of these runs


if __name__ == "__main__":
    main()
