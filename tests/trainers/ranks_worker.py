"""Twenty steps of each trainer on one rank and on two, and resumed on the other number; started by `test_ranks`."""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from .forked import on_ranks
from .models import VARIANTS, VOCAB, folder
from .parity import patched
from .rule import Outcome
from .runs import Case, build, forget_precision, train

STEPS, SAVED = 20, 10
BATCH = 8
#: Rows that are drawn for a rollout are shuffled within a rank, so that a step must train on all of them.
POLICY = {"beta": 0.1, "steps_per_generation": 1}
OPTIONS: dict[str, dict[str, Any]] = {"GRPO": POLICY, "RLOO": POLICY, "DPO": {}, "OnlineDPO": {}}
Found = dict[str, Outcome]


class RowByRow:
    """Stands for `generate`: what a prompt gets does not depend on the other prompts of its rank."""

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen: Counter[int] = Counter()
        rows = []
        for ids in input_ids.tolist():
            prompt = functools.reduce(lambda number, token: (number * VOCAB + token) % 2**31, ids, 0)
            generator = torch.Generator().manual_seed(1000 * prompt + seen[prompt])
            seen[prompt] += 1
            row = torch.randint(3, VOCAB, (8,), generator=generator)
            end = int(torch.randint(2, 12, (), generator=generator))
            row[end : end + 1] = 1
            row[end + 1 :] = 0
            rows.append(row)
        return torch.cat([input_ids, torch.stack(rows).to(input_ids.device)], 1)


def _generates_row_by_row(trainer: Any) -> None:
    if hasattr(trainer, "num_generations") or hasattr(trainer, "generation_config"):
        trainer.accelerator.unwrap_model(trainer.model).generate = RowByRow()


def _case(trainer: str, ranks: int, **more: Any) -> Case:
    saving = {"save_strategy": "steps", "save_steps": SAVED}
    size = {"per_device_train_batch_size": BATCH // ranks}
    options = {**OPTIONS[trainer], "max_steps": STEPS, **saving, **size}
    extra = _one_epoch if "beta" in options else lambda path: {}
    return Case(trainer, {**options, **more}, canned=False, prepare=_generates_row_by_row, extra=extra)


def _one_epoch(path: str) -> dict[str, Any]:
    """Prompts for all steps of GRPO and RLOO: TRL takes them in the first epoch's order after resuming in any."""
    return {"train_dataset": Dataset.from_dict({"prompt": [f"{number}*{number}=" for number in range(2 * STEPS)]})}


def _unreduced(trainer: type) -> type:
    """A trainer whose loss goes around DDP, whose forward is what prepares the sum of gradients."""

    class Unreduced(trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(self.accelerator.unwrap_model(model), *args, **kwargs)

    return Unreduced


def whole(out: str, ranks: int, ours: bool, variants: tuple[str, ...]) -> None:
    """All steps of each trainer, from each variant of the weights; checkpoints go to `<out>/<trainer>`."""
    found: Found = {}
    for name in OPTIONS:
        for variant in variants:
            with patched() if ours else nullcontext():
                trainer = build(_case(name, ranks), variant)
                trainer.args.output_dir = f"{out}/{name}" if variant == "plain" else trainer.args.output_dir
                found[f"{name} {variant}"] = train(trainer)
    _write(out, found)


def resumed(out: str, ranks: int, checkpoints: str) -> None:
    """The second half of each trainer's steps, from the checkpoint of another job."""
    found: Found = {}
    for name in OPTIONS:
        with patched():
            trainer = build(_case(name, ranks, save_strategy="no"))
            found[name] = train(trainer, resume_from_checkpoint=f"{checkpoints}/{name}/checkpoint-{SAVED}")
    _write(out, found)


def unreduced(out: str) -> None:
    """Two steps without DDP's sum of gradients."""
    case = _case("GRPO", 2, max_steps=2, save_strategy="no")
    case.subclass = _unreduced
    with patched():
        _write(out, {"GRPO": train(build(case))})


def _write(out: str, found: Found) -> None:
    Path(out).mkdir(exist_ok=True)
    torch.save(found, f"{out}/rank-{os.environ.get('RANK', '0')}.pt")


def main(out: str) -> None:
    torch.set_num_threads(1)
    for variant in VARIANTS:
        folder("qwen2", variant)
    with patched():
        for name in OPTIONS:
            build(_case(name, 1))  # what this imports, no rank imports again
    forget_precision()
    on_ranks(1, whole, f"{out}/one-stock", 1, False, VARIANTS)
    on_ranks(1, whole, f"{out}/one", 1, True, VARIANTS[:1])
    on_ranks(2, whole, f"{out}/two", 2, True, VARIANTS[:1])
    on_ranks(1, resumed, f"{out}/two-then-one", 1, f"{out}/two")
    on_ranks(2, resumed, f"{out}/one-then-two", 2, f"{out}/one")
    on_ranks(2, unreduced, f"{out}/unreduced")


if __name__ == "__main__":
    main(*sys.argv[1:])
