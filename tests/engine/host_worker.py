"""A training script of one host among several, as `accelerate launch` starts it; its vLLM is a server elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch


def main(out: Path, address: str) -> None:
    from peft import LoraConfig
    from trl.generation.vllm_client import VLLMClient

    import trl_turbo
    from tests.engine.inference_server import without_nccl
    from tests.engine.trainers import metric, trainer

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    report = trl_turbo.patch(verbose=False)
    sent: list[Any] = []
    for name, method in without_nccl(sent).items():
        setattr(VLLMClient, name, method)
    trained = trainer(
        "GRPO",
        out / str(rank),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        max_steps=1,
        vllm_mode="server",
        vllm_server_base_url=address,
    )
    trained.train()
    found = {
        "sent": sent,
        "loss": metric(trained, "loss"),
        "hosts": (trained.accelerator.num_processes, trained.accelerator.local_process_index),
        "trained": {name: p.detach().clone() for name, p in trained.model.named_parameters() if p.requires_grad},
        "notes": [note.text for note in report.notes],
    }
    torch.save(found, out / f"rank-{rank}.pt")
    trained.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
