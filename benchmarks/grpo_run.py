"""One GRPO training in a process of its own, for `benchmarks.grpo`: prints one line of JSON after `RESULT`.

Fixed lengths, so that every contestant does the same work. The script is TRL's; `--before` runs ahead of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from typing import Any

from benchmarks import ranks


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a model with its tokenizer")
    parser.add_argument("--before", default="", help="Python that runs before TRL is imported")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, default=512)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=1, help="prompts of a step")
    parser.add_argument("--micro", type=int, default=8, help="sequences of a micro-batch")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA adapter; 0 trains all weights")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--share", type=float, default=0.1, help="vllm_gpu_memory_utilization")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--unsloth", action="store_true", help="load through Unsloth, with its engine")
    parser.add_argument("--sleep", action="store_true", help="vllm_enable_sleep_mode")
    parser.add_argument("--cap-gb", type=float, help="let torch take so much and no more, and vLLM its share of it")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks that one vLLM is spread over")
    return parser.parse_args()


class Peak:
    """The highest memory that the driver reports in use, over what it reported at first, in bytes."""

    def __init__(self) -> None:
        import torch

        self._info = torch.cuda.mem_get_info
        torch.cuda.init()
        self.base = self._used()
        self.bytes = 0
        self._running = True
        threading.Thread(target=self._watch, daemon=True).start()

    def _used(self) -> int:
        free, total = self._info()
        return total - free

    def now(self) -> int:
        return self._used() - self.base

    def _watch(self) -> None:
        while self._running:
            self.bytes = max(self.bytes, self.now())
            time.sleep(0.005)

    def stop(self) -> int:
        self._running = False
        return self.bytes


def prompts(tokenizer: Any, length: int) -> list[str]:
    """Texts of `length` tokens."""
    texts = []
    for seed in range(64):
        words = " ".join(f"item{(7 * seed + j) % 900}" for j in range(length))
        texts.append(tokenizer.decode(tokenizer(words)["input_ids"][:length]))
    return texts


def odd_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that random weights vary in."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def capped(cap_gb: float | None) -> float:
    """Let torch take no more than a cap, the context included; returns the cap's share of the device."""
    import torch

    free, total = torch.cuda.mem_get_info()
    if cap_gb is None:
        return 1.0
    left = cap_gb * 2**30 - (total - free)
    torch.cuda.set_per_process_memory_fraction(max(0.0, left / total))
    return cap_gb * 2**30 / total


def load(folder: str, load_in_4bit: bool) -> Any:
    """The model as a TRL script loads it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    extra: dict[str, Any] = {}
    if load_in_4bit:
        extra["device_map"] = {"": 0}
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **extra)


def load_unsloth(args: argparse.Namespace, share: float) -> Any:
    """The model with its adapter as Unsloth's notebooks load it, with its engine over the same weights."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=args.model,
        max_seq_length=args.prompt + args.completion + 16,
        load_in_4bit=args.load_in_4bit,
        fast_inference=True,
        max_lora_rank=args.rank,
        gpu_memory_utilization=share,
    )
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(
        model,
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=projections,
        use_gradient_checkpointing="unsloth",
        random_state=1,
    )


def plan_of(trainer: Any) -> tuple[Any, Any]:
    """What trl_turbo plans for this trainer, and what it measured of each phase, where it is on.

    There is no plan of a model that is spread over processes.
    """
    turbo = sys.modules.get("trl_turbo")
    if turbo is None:
        return None, None
    try:
        planned = turbo.plan(trainer).to_dict()
    except ValueError:
        if trainer.accelerator.num_processes == 1:
            raise
        planned = None
    return planned, turbo.status().peaks


def explained(model: Any, vocabulary: int, length: int) -> float:
    """What rounding explains of the mean difference between vLLM's log-probs and the trainer's, in this model."""
    import torch

    from trl_turbo.engine import parity

    ids = torch.randint(8, vocabulary, (1, length), generator=torch.Generator().manual_seed(1))
    return parity.explained(model, ids.to(next(model.parameters()).device), length // 2)


def main() -> None:
    args = arguments()
    if args.unsloth:
        import unsloth  # noqa: F401  (ahead of TRL, which it patches)
    exec(args.before)
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    peak = Peak()
    share = args.share * capped(args.cap_gb)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    step_times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            step_times.append(time.perf_counter() - self.begin)

    config = GRPOConfig(
        output_dir="/tmp/trl_turbo_bench",
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=max(1, args.group * args.prompts // args.micro),
        num_generations=args.group,
        max_completion_length=args.completion,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        bf16=True,
        gradient_checkpointing=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        generation_kwargs={"ignore_eos": True},
        disable_tqdm=True,
        seed=1,
        use_liger_kernel=args.liger,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=share,
        vllm_tensor_parallel_size=args.tensor_parallel,
        vllm_enable_sleep_mode=args.sleep,
        vllm_max_model_length=args.prompt + args.completion + 16,
    )
    if args.unsloth:
        model, adapter = load_unsloth(args, share), None
    else:
        model = load(args.model, args.load_in_4bit)
        adapter = (
            LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
            if args.rank
            else None
        )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=odd_tokens,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts(tokenizer, args.prompt)}),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[Clock()],
    )
    rollouts: list[float] = []
    generate = trainer._generate_single_turn

    def timed(*given: Any, **named: Any) -> Any:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = generate(*given, **named)
        torch.cuda.synchronize()
        rollouts.append(time.perf_counter() - begin)
        return result

    trainer._generate_single_turn = timed
    syncs: list[float] = []
    # Unsloth samples from an engine of its own, which TRL's object may not stand before
    generation = getattr(trainer, "vllm_generation", None)
    sync_weights = getattr(generation, "sync_weights", None)

    def synced(*given: Any, **named: Any) -> Any:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        sync_weights(*given, **named)
        torch.cuda.synchronize()
        syncs.append(time.perf_counter() - begin)

    if sync_weights is not None:
        generation.sync_weights = synced
    loaded = peak.now()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    top = peak.stop()
    half = args.steps // 2  # the first ones compile and warm up
    step, rollout = statistics.median(step_times[half:]), statistics.median(rollouts[half:])
    shared = getattr(getattr(generation, "llm", None), "shared", None)
    planned, phases = plan_of(trainer)
    history = trainer.state.log_history
    gaps = [entry[name] for entry in history for name in entry if name.endswith("sampling_logp_difference/mean")]
    result = {
        "peak_gb": top / 2**30,
        "loaded_gb": loaded / 2**30,
        "torch_gb": torch.cuda.max_memory_allocated() / 2**30,
        "step_s": step,
        "rollout_s": rollout,
        "train_s": step - rollout,
        "sync_ms": 1e3 * statistics.median(syncs[half:] or syncs or [0.0]),
        "tokens_s": args.group * args.prompts * args.completion / rollout,
        "steps_s": step_times,
        "rollouts_s": rollouts,
        "logp_gap_largest": max(gaps, default=None),
        "logp_gap_last": gaps[-1] if gaps else None,
        "loss": [entry["loss"] for entry in history if "loss" in entry][:4],
        "memory": shared.memory_report().to_dict() if shared is not None else None,
        "in_use_at_first_gb": peak.base / 2**30,
        "plan": planned,
        "phases": phases,
    }
    if not args.unsloth:  # all ranks at once, whose shards it takes
        result["logp_gap_explained"] = explained(trainer.model, len(tokenizer), 128)
    if trainer.accelerator.num_processes > 1:
        result = ranks.together(result, trainer.model)
    if args.cap_gb is not None and peak.base + top > args.cap_gb * 2**30:
        result["error"] = f"took {(peak.base + top) / 2**30:.1f} GB of a cap of {args.cap_gb:g}"
    if trainer.accelerator.is_main_process:
        print("RESULT " + json.dumps(result), flush=True)
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # vLLM's teardown takes longer than some of these runs


if __name__ == "__main__":
    main()
