"""The training part of a GRPO step, log-probs forward and backward, as TRL has it and on packed rows.

    python -m benchmarks.packing --out benchmarks/results/packing

A GRPO trainer with LoRA of rank 16 and gradient checkpointing computes its loss and the gradients on a prepared batch
of one group: a prompt, once for each of its answers. Before anything is timed, log-probs and gradients must be stock's
by the rule of the tests: as close as stock is to itself where every weight moves by one unit in the last place. Then
interleaved rounds on one trainer, stock and patched (all that is on by default, with packing and without); memory is
torch's peak above what lay there. Writes OUT.json and OUT.png. Without a CUDA device it runs a tiny model.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import trl_turbo
from benchmarks import measure, models

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
#: What patch() is called with; `None` is stock TRL.
CONTESTANTS: dict[str, dict[str, bool] | None] = {
    "trl": None,
    "trl_turbo, padded": {"packing": False, "rollout": False},
    "trl_turbo": {"packing": True, "rollout": False},
}
OURS = "trl_turbo"
#: A whole run may be as far from stock as this many times what a unit in the last place of the weights moves stock.
FACTOR = 4


@dataclass(frozen=True)
class Setting:
    """A batch, and what it is to reach.

    Attributes:
        prompt: Tokens of the prompt.
        completion: Tokens of the longest answer.
        group: Answers of the prompt.
        fill: The shortest answer as a share of the longest; the others lie between.
        speed: How many times as fast as stock, `None` without a bar.
        memory: The share of stock's memory that it may take, `None` without a bar.
    """

    prompt: int
    completion: int
    group: int = 8
    fill: float = 1.0
    speed: float | None = None
    memory: float | None = None

    def __str__(self) -> str:
        filled = "" if self.fill == 1 else f", answers from {self.fill:.0%} of that on"
        return f"prompt {self.prompt:,}, completion {self.completion:,}, G = {self.group}{filled}"


SETTINGS = (
    Setting(2048, 512, speed=2.2, memory=0.5),
    Setting(512, 4096, speed=1.0),
    Setting(512, 4096, fill=0.1),
)
TINY = (Setting(48, 16, 4), Setting(8, 32, 4, fill=0.2))


def trainer_of(shape: str, settings: tuple[Setting, ...], rank: int) -> Any:
    """A trainer of random weights, its model prepared as `train()` prepares it."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(models.config(shape), dtype=torch.bfloat16)
    config = GRPOConfig(
        output_dir="/tmp/trl_turbo_bench",
        per_device_train_batch_size=max(s.group for s in settings),
        num_generations=max(s.group for s in settings),
        max_completion_length=max(s.completion for s in settings),
        bf16=True,
        use_cpu=not CUDA,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to=[],
        beta=0.0,
    )
    # Random on both sides, so that every weight of an adapter has a gradient
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=models.tokenizer(models.config(shape).vocab_size),
        peft_config=lora,
    )
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def batch_of(setting: Setting, vocab: int) -> dict[str, torch.Tensor]:
    """What `_compute_loss` takes: one group, its answers of equal or ragged lengths."""
    numbers = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, vocab, (1, setting.prompt), generator=numbers).expand(setting.group, -1)
    completion = torch.randint(3, vocab, (setting.group, setting.completion), generator=numbers)
    shares = torch.linspace(setting.fill, 1.0, setting.group)
    lengths = (shares * setting.completion).round().long().clamp(min=1)
    mask = (torch.arange(setting.completion) < lengths[:, None]).long()
    batch = {
        "prompt_ids": prompt.contiguous(),
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion * mask,
        "completion_mask": mask,
        "advantages": torch.linspace(-1.0, 1.0, setting.group),
        "num_items_in_batch": mask.sum(),
    }
    return {name: value.to(DEVICE) for name, value in batch.items()}


def step(trainer: Any, batch: dict[str, torch.Tensor]) -> None:
    """The loss and its gradients."""
    for parameter in trainer.model.parameters():
        parameter.grad = None
    with trainer.compute_loss_context_manager():
        loss = trainer._compute_loss(trainer.model_wrapped, dict(batch))
    trainer.accelerator.backward(loss)


@contextmanager
def patched(trainer: Any, keywords: dict[str, bool] | None) -> Iterator[None]:
    """With all that is on by default and these; what looks at a model when it is prepared is shown this one."""
    if keywords is None:
        yield
        return
    trl_turbo.patch(strict=True, verbose=False, **keywords)
    try:
        from trl_turbo.patches.blocks.models import ADOPT, adopt
        from trl_turbo.patches.lora.models import hook_model

        hook_model(trainer.model)
        for feature in ADOPT:
            adopt(feature, trainer.model)
        yield
    finally:
        trl_turbo.unpatch()


def outcome(trainer: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the answers [N], and all gradients in one row."""
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
    keep = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(trainer.model_wrapped, ids, mask, keep)[0]
    step(trainer, batch)
    grads = [p.grad.flatten().float() for p in trainer.model.parameters() if p.grad is not None]
    return logps[batch["completion_mask"] != 0].float(), torch.cat(grads)


def check(trainer: Any, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """How far each contestant is from stock, in units of what is allowed; above 1 is wrong."""
    plain = outcome(trainer, batch)
    kept = [p.detach().clone() for p in trainer.model.parameters()]
    numbers = torch.Generator(DEVICE).manual_seed(2)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=numbers, device=DEVICE) * 2 - 1
            parameter.mul_(1 + torch.finfo(torch.bfloat16).eps * signs)
    moved = outcome(trainer, batch)
    with torch.no_grad():
        for parameter, before in zip(trainer.model.parameters(), kept, strict=True):
            parameter.copy_(before)
    del kept
    found = {}
    for name, keywords in CONTESTANTS.items():
        if keywords is not None:
            with patched(trainer, keywords):
                ours = outcome(trainer, batch)
            pairs = zip(("logps", "gradients"), ours, plain, moved, strict=True)
            found[name] = {
                what: ((mine - stock).norm() / (FACTOR * (other - stock).norm())).item()
                for what, mine, stock, other in pairs
            }
    return found


def timed(trainer: Any, batch: dict[str, torch.Tensor], rounds: int) -> dict[str, measure.Timing]:
    """Interleaved rounds; in each, a contestant runs once to warm up after the switch, and then for the clock."""
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    memory: dict[str, float] = {}
    run: Callable[[], None] = lambda: step(trainer, batch)  # noqa: E731
    for k in range(rounds):
        for name, keywords in CONTESTANTS.items():
            with patched(trainer, keywords):
                try:
                    run()
                    if k == 0:
                        memory[name] = measure.peak_mib(run)
                    times[name].append(measure.one_ms(run))
                except torch.OutOfMemoryError:
                    print(f"  {name} runs out of memory")
            gc.collect()
    return {name: measure._timing(sorted(t), memory[name]) for name, t in times.items() if t}


def measured(trainer: Any, setting: Setting, rounds: int) -> dict[str, Any]:
    print(f"\n{setting}")
    batch = batch_of(setting, trainer.model.config.vocab_size)
    wrong = check(trainer, batch)
    row: dict[str, Any] = {"setting": str(setting), "bar": {"speed": setting.speed, "memory": setting.memory}}
    row["off"] = {name: {what: round(x, 3) for what, x in found.items()} for name, found in wrong.items()}
    print("  off, in units of what is allowed:", row["off"])
    if not all(x <= 1 for found in wrong.values() for x in found.values()):
        raise SystemExit(f"{setting}: log-probs or gradients are not stock's; nothing is timed")
    times = timed(trainer, batch, rounds)
    row["timings"] = measure.as_rows(times)
    stock = times.get("trl")
    for name, timing in times.items():
        line = f"  {name:<18} {timing.median_ms:9.1f} ms  {timing.extra_mib:9.0f} MiB"
        if stock is not None and name != "trl":
            line += f"  {stock.median_ms / timing.median_ms:5.2f}x as fast"
            if stock.extra_mib:
                line += f", {timing.extra_mib / stock.extra_mib:.2f} of the memory"
        print(line)
    if stock is not None and CUDA:
        ours = times[OURS]
        reached = setting.speed is None or stock.median_ms / ours.median_ms >= setting.speed
        row["reached"] = reached and (setting.memory is None or ours.extra_mib <= setting.memory * stock.extra_mib)
        print("  bars:", "reached" if row["reached"] else "MISSED", row["bar"])
    return row


def picture(data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = data["results"]
    figure, axes = plt.subplots(2, len(rows), figsize=(4.2 * len(rows), 6), layout="constrained", squeeze=False)
    for column, row in enumerate(rows):
        for line, (key, label) in enumerate((("median_ms", "ms"), ("extra_mib", "MiB above the model"))):
            axis = axes[line][column]
            bars = axis.bar(list(row["timings"]), [t[key] for t in row["timings"].values()])
            axis.bar_label(bars, fmt="%.0f")
            axis.set_ylabel(label)
            axis.tick_params("x", labelsize=8)
        axes[0][column].set_title(row["setting"], fontsize=9)
    figure.suptitle(f"GRPO, loss and gradients, {data['shape']}, {data['environment']['card']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-1.5b" if CUDA else "tiny", choices=models.SHAPES)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    about = measure.environment(("trl", "transformers", "peft", "triton"))
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    settings = SETTINGS if CUDA else TINY
    trainer = trainer_of(args.shape, settings, args.rank)
    results = [measured(trainer, setting, args.rounds) for setting in settings]
    for note in trl_turbo.status().notes:
        print("note", note.feature, note.text)
    if args.out is not None:
        data = {"environment": about, "shape": args.shape, "rank": args.rank, "results": results}
        measure.write(args.out, data, lambda path: picture(data, path))


if __name__ == "__main__":
    main()
