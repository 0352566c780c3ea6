"""A model under DeepSpeed's ZeRO, trained by its engine, beside a vLLM that takes the adapter alone; two processes.

accelerate starts DeepSpeed on GPUs alone, so no TRL trainer is in this: what the engine is told is what TRL tells it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

CONFIG = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": 2, "zero_allow_untested_optimizer": True}


def _model(folder: Path, config: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    # While it lives, `from_pretrained` shards what it reads, as it does in a script with stage 3
    known = HfDeepSpeedConfig(config) if config["zero_optimization"]["stage"] == 3 else None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    del known
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def _gap(llm: Any, model: Any) -> float:
    from trl_turbo.engine import parity
    from trl_turbo.engine.gather import assembled

    prompt = parity.probe_prompt(200)
    ids, logprobs = llm._sample(prompt, parity.SAMPLED_TOKENS)
    with assembled(model):
        return parity.gap(model, prompt, ids, logprobs).mean


def _train(folder: Path, stage: int, applied: str, rate: float) -> dict[str, Any]:
    import deepspeed

    from tests.engine.conftest import trl_arguments
    from trl_turbo.engine.llm import TurboLLM
    from trl_turbo.engine.serving import Trainee, serving
    from trl_turbo.engine.sizing import Work

    os.environ["TRL_TURBO_ROLLOUT_ADAPTER"] = applied
    torch.manual_seed(0)
    config = {**CONFIG, "zero_optimization": {"stage": stage}}
    model = _model(folder, config)
    plugin = SimpleNamespace(zero_stage=stage)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=plugin))
    with serving(lambda: Trainee(model, accelerator, Work(4, 16, 32))):
        llm = TurboLLM(**trl_arguments(SimpleNamespace(name_or_path=str(folder))))
    found: dict[str, Any] = {"served": llm.served is not None, "declined": llm.declined, "stale": [], "pushed": []}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=rate), config=config)
    found["sharded"] = [p.numel() == 0 for p in model.parameters()]
    for _ in range(2):
        ids = torch.randint(5, 200, (1, 12))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        found["stale"].append(_gap(llm, model))
        llm.refresh()
        found["pushed"].append(_gap(llm, model))
    found["folded"] = llm.served.fold is not None and llm.served.fold.folded
    llm._give_up()
    return found


def main(out: Path) -> None:
    import deepspeed

    from tests.engine.models import saved

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    folder = out / f"model-{rank}"
    saved(folder, "qwen2_tied", initializer_range=0.05)
    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed("gloo")
    # More is lost to rounding at the larger rate than is remembered, and the adapter would be served
    applied = {3: ("merged", 8e-3), 2: ("served", 2e-2)}
    trained = {f"zero {stage}": _train(folder, stage, *how) for stage, how in applied.items()}
    torch.save(trained, out / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
