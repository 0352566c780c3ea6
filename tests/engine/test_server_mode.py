"""Server mode stays TRL's own, to the byte; and the configuration for several hosts that the documentation gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import free_port
from tests.engine.inference_server import serving, without_nccl
from tests.engine.launches import LEFT, ROOT, assert_equal
from tests.engine.trainers import trainer as make_trainer

pytestmark = [pytest.mark.vllm, pytest.mark.trl]

CONFIG = ROOT / "examples" / "accelerate" / "two_hosts.yaml"


def _asked(tmp: Path, patch: pytest.MonkeyPatch, *, patched: bool) -> tuple[list[Any], list[Any], list[str]]:
    """What a training asked of its server, what it sent it, and what it was told."""
    from peft import LoraConfig
    from trl.generation import vllm_client

    import trl_turbo

    before = dict(vars(vllm_client.VLLMClient))
    # Kernels round otherwise than TRL does, so what is sent would differ in its last bits
    off = dict.fromkeys(("attention", "checkpointing", "logprob", "lora", "mlp", "norms", "rope", "shared_pass"), False)
    report = trl_turbo.patch(**off, rollout=True, verbose=False) if patched else None
    assert dict(vars(vllm_client.VLLMClient)) == before
    sent: list[Any] = []
    for name, method in without_nccl(sent).items():
        patch.setattr(vllm_client.VLLMClient, name, method)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with serving() as (address, asked):
        trained = make_trainer(
            "GRPO", tmp, peft_config=config, max_steps=2, vllm_mode="server", vllm_server_base_url=address
        )
        assert not hasattr(trained.vllm_generation, "llm")
        trained.train()
    notes = [note.text for note in report.notes if note.feature == "rollout"] if report is not None else []
    if patched:
        trl_turbo.unpatch()
    return asked, sent, notes


@pytest.mark.usefixtures("one_process")
def test_a_server_is_asked_and_updated_as_trl_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = _asked(tmp_path / "model", monkeypatch, patched=False)
    asked, sent, notes = _asked(tmp_path / "model", monkeypatch, patched=True)
    assert asked == stock[0]
    assert [path for path, _ in asked].count("/v1/completions") == 2
    assert sent == stock[1]
    assert len(sent) == 1 + 2  # the communicator, and a sync for each step
    assert sent[1] != sent[2]  # the second sync has the first step in it
    assert len(notes) == 1
    assert "TRL's own client, arguments and sync are used as they are" in notes[0]
    assert "the adapter is merged and every weight sent" in notes[0]


@pytest.mark.slow
def test_two_hosts_train_with_one_server(tmp_path: Path) -> None:
    """The configuration of the documentation, on two processes that take themselves for hosts."""
    port = str(free_port())
    with serving() as (address, asked):
        hosts = [_host(rank, port, tmp_path, address) for rank in range(2)]
        texts = [host.communicate(timeout=300)[0] for host in hosts]
    for host, text in zip(hosts, texts, strict=True):
        assert host.returncode == 0, text[-4000:]
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]
    assert [rank["hosts"] for rank in ranks] == [(2, 0), (2, 0)]
    assert len(ranks[0]["sent"]) == 1 + 1  # the communicator and a sync
    assert not ranks[1]["sent"]  # one process speaks with the server, for both
    prompts = [len(body["prompt"]) for path, body in asked if path == "/v1/completions"]
    assert prompts == [2]  # a group of each host
    assert_equal([{"both": rank} for rank in ranks], "both")


def _host(rank: int, port: str, out: Path, address: str) -> subprocess.Popen[str]:
    changed = ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    here = ["--num_processes", "2", "--mixed_precision", "no"]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), *changed, *here),
            *("--module", "tests.engine.host_worker", str(out), address),
        ],
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if name not in LEFT},
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "TRL_TURBO_DASHBOARD": "0",
            "TRL_TURBO_GUARDS": "0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_configuration_is_one_that_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIG))
    assert (config.num_machines, config.num_processes, config.machine_rank) == (2, 16, 0)
    assert config.distributed_type.value == "MULTI_GPU"
