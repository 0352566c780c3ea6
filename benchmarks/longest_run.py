"""The training part of GRPO at one completion length, in a process of its own, for `benchmarks.longest`.

Completions are given, not sampled, and no engine is there; micro-batches of one sequence run until the second of them
is done, by when gradients are there as well. Prints one line of JSON after `RESULT`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from benchmarks.grpo_run import Peak, capped, load, odd_tokens, plan_of, prompts


class Enough(Exception):  # noqa: N818 (not an error)
    """All that was to be run has run."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a model with its tokenizer")
    parser.add_argument("--before", default="", help="Python that runs before TRL is imported")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, required=True)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--cap-gb", type=float, required=True)
    parser.add_argument("--load-in-4bit", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    exec(args.before)
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    peak = Peak()
    capped(args.cap_gb)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    config = GRPOConfig(
        output_dir="/tmp/trl_turbo_bench",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=args.group,
        num_generations=args.group,
        max_completion_length=args.completion,
        max_steps=1,
        bf16=True,
        gradient_checkpointing=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
    )
    trainer = GRPOTrainer(
        model=load(args.model, args.load_in_4bit),
        reward_funcs=odd_tokens,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts(tokenizer, args.prompt)}),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )

    def generate(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        drawn = torch.randint(3, len(tokenizer), (len(input_ids), args.completion), device=input_ids.device)
        return torch.cat((input_ids, drawn), 1)

    trainer.accelerator.unwrap_model(trainer.model).generate = generate
    step, times = trainer.training_step, []

    def training_step(*given: Any, **named: Any) -> Any:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = step(*given, **named)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        if len(times) == args.micro_batches:
            raise Enough
        return result

    trainer.training_step = training_step
    error = None
    try:
        trainer.train()
    except Enough:
        pass
    except torch.OutOfMemoryError as caught:
        error = str(caught).splitlines()[0]
    planned, phases = plan_of(trainer)
    top = peak.stop()
    result = {
        "completion": args.completion,
        "fits": error is None,
        "peak_gb": (peak.base + top) / 2**30,
        "torch_gb": torch.cuda.max_memory_allocated() / 2**30,
        "micro_batch_s": times,
        "plan": planned,
        "phases": phases,
        "out_of_memory": error,
    }
    if result["peak_gb"] > args.cap_gb:
        result |= {"fits": False, "out_of_memory": f"took {result['peak_gb']:.1f} GB of {args.cap_gb:g}"}
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
