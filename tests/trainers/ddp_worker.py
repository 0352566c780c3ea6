"""Train every trainer that this TRL has in one of several processes, stock and patched; started by `test_ddp`."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trl_turbo.patches.attention import passes

from .adapters import lora
from .models import VARIANTS, folder
from .parity import Path as Way
from .parity import patched
from .runs import Case, run

OPTIONS: dict[str, dict[str, Any]] = {
    "GRPO": {"max_steps": 2, "beta": 0.1},
    "RLOO": {"max_steps": 2, "beta": 0.1},
    "DPO": {"max_steps": 2, "per_device_train_batch_size": 2},
    "OnlineDPO": {"max_steps": 2, "per_device_train_batch_size": 2},
    "PPO": {"total_episodes": 16, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
}
# Without checkpointing, transformers lets DDP look for unused parameters
CHECKPOINTING = {"checkpointed": {"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "": {}}


def _case(trainer: str, adapter: str, checkpointing: str) -> Case:
    options = {**OPTIONS[trainer], "gradient_checkpointing": bool(checkpointing), **CHECKPOINTING[checkpointing]}
    return Case(trainer, options, peft=lora() if adapter else None)


CASES = {
    "-".join(filter(None, parts)): _case(*parts)
    for parts in itertools.product(OPTIONS, ("", "lora"), CHECKPOINTING)
    # Stock PPO reads `.policy` off its model, which DDP has wrapped, where an adapter stands for the reference
    if parts[0] != "PPO" or not any(parts[1:])
}
# A rollout that is trained on in one step, and in two micro-batches of one; their passes are counted, of which packed
# rows need as many as a rank's tokens fill
COUNTED = []
for label, options in {
    "one-step": {"steps_per_generation": 1},
    "accumulated": {"steps_per_generation": 2, "gradient_accumulation_steps": 2},
}.items():
    COUNTED.append(f"RLOO-lora-{label}")
    CASES[COUNTED[-1]] = Case("RLOO", {**OPTIONS["RLOO"], **options}, peft=lora())
# Trained on packed rows, too
PACKED = ("GRPO-lora-checkpointed", "DPO-checkpointed", "OnlineDPO-lora")
LABELS = sorted([*CASES, *(f"{label}-packed" for label in PACKED)])


def trained(case: Case, draws: Sequence[str] = VARIANTS[1:], **features: bool) -> dict[str, Any] | str:
    """Stock, perturbed and patched runs of a case, or why there are none."""
    if case.missing():
        return case.missing()
    try:
        plain = run(case)
    except RuntimeError as error:
        return f"stock fails in two processes: {error}"[:200]
    perturbed = [run(case, variant) for variant in draws]
    return {"stock": plain, "perturbed": perturbed, **_patched(case, **features)}


def _patched(case: Case, **features: bool) -> dict[str, Any]:
    with patched(**features) as path:
        ours = run(case)
    # Requests hold functions, which do not travel: what is asked of them is whether all were answered
    unanswered = [request for request in path.requests if not request.answered]
    assert not unanswered, path.notes
    return {
        "patched": ours,
        "passes": (sum(call.grad for call in path.kernel), sum(not call.grad for call in path.kernel)),
        "path": Way([], path.kernel[:1], 0, path.notes, path.others),
    }


def _packed(case: Case) -> dict[str, Any]:
    """The same case on packed rows; every pass is one, and prompts are shared."""
    arranged, arrange = [], passes._arrange

    def watched(*args: Any) -> Any:
        arranged.append(arrange(*args))
        return arranged[-1]

    passes._arrange = watched
    try:
        found = _patched(case, packing=True)
    finally:
        passes._arrange = arrange
    assert all(isinstance(each, passes.Arranged) for each in arranged), found["path"].others
    assert any(max(each.layout.segments.prefix) >= 0 for each in arranged)
    return found


def main(out: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py: accelerate collects garbage in every run
    for variant in VARIANTS:
        folder("qwen2", variant)
    found = {label: trained(case, **({"packing": False} if label in COUNTED else {})) for label, case in CASES.items()}
    for label in PACKED:
        plain = found[label]
        found[f"{label}-packed"] = plain if isinstance(plain, str) else {**plain, **_packed(CASES[label])}
    torch.save(found, Path(out) / f"rank-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
