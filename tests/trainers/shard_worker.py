"""Train on sharded parameters in one of several processes, stock and patched; started by `test_sharded`."""

from __future__ import annotations

import gc
import itertools
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import torch
from transformers import TrainerCallback

from trl_turbo.patches.attention import interface, passes
from trl_turbo.patches.blocks import mlp, norms, rope
from trl_turbo.patches.checkpointing import tiled
from trl_turbo.patches.logprob import forward, fused_head
from trl_turbo.patches.lora import group, layers
from trl_turbo.patches.lora import mlp as lora_mlp

from .adapters import lora
from .ddp_worker import trained
from .models import VOCAB, folder, load
from .parity import TRL_HAS_FUSED_HEAD, patched
from .rule import ulp
from .runs import Case, build, train
from .sharded import deepspeed_on_cpu, fsdp2_on_cpu, not_zero3, whole, zero
from .test_no_logits import BUDGET_BYTES, Largest, largest

STEPS: dict[str, Any] = {"max_steps": 2}
# Without its checkpointing, accelerate's DDP looks for unused parameters; here it is there for the kernels
CHECKPOINTED = {**STEPS, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _every_linear_a_unit(trainer: Any) -> None:
    """The head, too: it is taken apart again right after its call."""
    trainer.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = ["Linear"]


def _layers_are_units(trainer: Any) -> None:
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.transformer_cls_names_to_wrap = None


def _another_reference(path: str) -> dict[str, Any]:
    """Not the policy itself: where rewards are zero but for rounding, it decides which of two is the better one."""
    return {"ref_model": load(folder("qwen2" if "untied" in path else "qwen2-untied", "plain", ulp(torch.float32)))}


# More than the rule's two. With TRL 1.12 both of these leave DPO's reward as it is, to the bit: a difference of sums of
# log-probs of 73, whose last place is 128 units of the rule. Of eight draws, six move it, by 3 to 10 units
DRAWS = tuple(f"perturbed-{number}" for number in range(1, 5))
PAIRS = {"per_device_train_batch_size": 2}
# Bounds that nothing reaches, as in test_precision.py
BF16 = {"bf16": True, "beta": 0.1, "epsilon": 0.99, "epsilon_high": 100.0}
COMMON: dict[str, Case] = {
    "GRPO": Case("GRPO", {**CHECKPOINTED, "beta": 0.1}),
    "GRPO-lora": Case("GRPO", {**STEPS, "beta": 0.1}, "qwen2-untied", peft=lora(*LINEARS)),
    "RLOO": Case("RLOO", {**STEPS, "beta": 0.1}, "qwen2-untied"),
    "DPO": Case("DPO", {**STEPS, **PAIRS}, extra=_another_reference),
    "DPO-lora": Case("DPO", {**CHECKPOINTED, **PAIRS}, "qwen2-untied", peft=lora("q_proj", "v_proj", "o_proj")),
    # ZeRO-3 refuses the device_map with which OnlineDPO loads a model by name, and the way in which it copies one
    "OnlineDPO": Case(
        "OnlineDPO",
        {**CHECKPOINTED, **PAIRS},
        "qwen2-untied",
        model=load,
        extra=_another_reference,
    ),
    "OnlineDPO-lora": Case("OnlineDPO", {**STEPS, **PAIRS}, model=load, peft=lora(*LINEARS)),
}
ALONE: dict[str, dict[str, Case]] = {
    "fsdp2": {
        "RLOO-lora": Case("RLOO", {**CHECKPOINTED, "beta": 0.1}, peft=lora(*LINEARS)),
        "OnlineDPO-head-of-its-own": Case(
            "OnlineDPO",
            {**STEPS, **PAIRS},
            "qwen2-untied",
            model=load,
            extra=_another_reference,
            prepare=_every_linear_a_unit,
        ),
        **{
            label: Case("GRPO", {**STEPS, **BF16}, "qwen2-untied", dtype=torch.bfloat16, peft=peft)
            for label, peft in {"GRPO-bf16": None, "GRPO-lora-bf16": lora(*LINEARS)}.items()
        },
        "OnlineDPO-bf16": Case(
            "OnlineDPO",
            {**STEPS, **PAIRS, "bf16": True},
            "qwen2-untied",
            dtype=torch.bfloat16,
            model=load,
            extra=_another_reference,
        ),
    },
    "zero2": {},
    "zero3": {
        "OnlineDPO-saved-head": Case(
            "OnlineDPO",
            {**STEPS, **PAIRS},
            "qwen2-untied",
            model=load,
            peft=lora(modules_to_save=["lm_head"]),
        )
    },
}
KINDS = tuple(ALONE)
# Off unless asked for (mlp_tiling), or in these tests, which have each of the others by itself
FEATURES: dict[str, dict[str, bool]] = {
    "GRPO": {"mlp_tiling": True, "attention": True},
    "GRPO-lora": {"packing": True},
    "RLOO": {"packing": True},
    "DPO": {"packing": True},
    "DPO-lora": {"attention": True},
    "OnlineDPO": {"attention": True},
    "OnlineDPO-lora": {"packing": True},
    "GRPO-bf16": {"packing": True},
    "GRPO-lora-bf16": {"attention": True},
    "OnlineDPO-bf16": {"attention": True},
}
# Whose log-probs and gradients are compared with those in float32, too
IN_BF16 = ("GRPO-bf16", "GRPO-lora-bf16")
KERNELS = (
    (norms, "rms_norm"),
    (rope, "rope"),
    (mlp, "gated"),
    (layers, "lora_linear"),
    (group, "lora_qkv"),
    (lora_mlp, "lora_mlp"),
    (tiled, "tiled"),
    (interface, "attention"),
)
# What makes no logits in which all rows are scored at once; stock makes them where TRL has no fused head
WITHOUT_LOGITS = ("GRPO", "DPO", "OnlineDPO")


def cases(kind: str) -> dict[str, Case]:
    """The trainings under `fsdp2`, `zero2` or `zero3`."""
    options = zero(int(kind[-1])) if kind.startswith("zero") else {}
    found = {**COMMON, **ALONE[kind]}
    for case in found.values():
        case.options = {**case.options, **options}
        if case.prepare is not _every_linear_a_unit:
            case.prepare = _layers_are_units
    return found


def _sizes(case: Case) -> dict[str, tuple[int, str]]:
    """The largest tensors as long as the vocabulary, of a patched run in small tiles and of stock."""
    found: dict[str, Largest] = {}
    with ExitStack() as stack:
        path = stack.enter_context(patched())
        for module in (forward, fused_head):
            small = partial(module.linear_logprob, byte_budget=BUDGET_BYTES)
            stack.enter_context(replaced.object(module, "linear_logprob", small))
        found["patched"] = largest(case)
    assert path.kernel
    if not TRL_HAS_FUSED_HEAD or case.trainer == "OnlineDPO":
        found["stock"] = largest(case)
    return {name: seen.of_vocabulary for name, seen in found.items()}


def _rounded(trainer: Any) -> None:
    """Weights that bf16 has, so that they are the same in float32."""
    _layers_are_units(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.copy_(parameter.bfloat16())


def _scores(case: Case) -> dict[str, torch.Tensor]:
    """Log-probs of many random tokens, and gradients of a sum of them, before the first step of a training."""
    generator = torch.Generator().manual_seed(17)
    ids = torch.randint(3, VOCAB, (48, 64), generator=generator)
    mask = (torch.arange(64) < torch.randint(32, 65, (48, 1), generator=generator)).long()
    share = torch.randn(48, 56, generator=generator) * mask[:, 8:] / mask[:, 8:].sum()
    found: dict[str, torch.Tensor] = {}

    class Scoring(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            logps = trainer._get_per_token_logps_and_entropies(model, ids, mask, 56)[0]
            (logps.float() * share).sum().backward()
            found["logps"] = logps.detach()[mask[:, 8:] == 1]
            found.update((name, whole(p.grad)) for name, p in model.named_parameters() if p.grad is not None)
            model.zero_grad()

    trainer = build(replace(case, prepare=_rounded, options={**case.options, "max_steps": 1}))
    trainer.add_callback(Scoring)
    train(trainer)
    return found


def _precise(case: Case, features: dict[str, bool]) -> dict[str, dict[str, torch.Tensor]]:
    """Scores by stock and by us, and what both round: those of stock in float32."""
    with patched(**features):
        ours = _scores(case)
    return {
        "patched": ours,
        "stock": _scores(case),
        "true": _scores(replace(case, options={**case.options, "bf16": False})),
    }


def _counted(case: Case, features: dict[str, bool]) -> dict[str, Any] | str:
    """As `trained`; of the patched run also how often each kernel was called, and how each pass was arranged."""
    ran: Counter[str] = Counter()
    arranged: list[tuple[str, int]] = []
    arrange = passes._arrange

    def watched(*args: Any) -> Any:
        way = arrange(*args)
        if not isinstance(way, passes.Arranged):
            arranged.append((str(way), 0))
        elif way.rows is None:
            arranged.append(("attention", way.targets.numel()))
        else:
            arranged.append(("packing", len(way.rows.index)))
        return way

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            ran[name] += 1
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for module, name in KERNELS:
            stack.enter_context(replaced.object(module, name, counting(name, getattr(module, name))))
        stack.enter_context(replaced.object(tiled, "TILE_ROWS", 16))
        stack.enter_context(replaced.object(passes, "_arrange", watched))
        found = trained(case, DRAWS, **features)
    return found if isinstance(found, str) else {**found, "ran": ran, "arranged": arranged}


def main(kind: str, *rest: str) -> None:
    *labels, out = rest
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py: accelerate collects garbage in every run
    with not_zero3():
        for family in ("qwen2", "qwen2-untied"):
            for variant, dtype in itertools.product(("plain", *DRAWS), {case.dtype for case in cases(kind).values()}):
                folder(family, variant, ulp(dtype))
    if kind == "fsdp2":
        fsdp2_on_cpu()
    else:
        deepspeed_on_cpu()
    found: dict[str, Any] = {}
    for label, case in cases(kind).items():
        if labels and label not in labels:
            continue
        found[label] = _counted(case, FEATURES.get(label, {}))
        if label in WITHOUT_LOGITS and not isinstance(found[label], str):
            found[label]["sizes"] = _sizes(case)
        if label in IN_BF16 and not isinstance(found[label], str):
            found[label]["scores"] = _precise(case, FEATURES[label])
    torch.save(found, Path(out) / f"rank-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
