"""Two GPUs: a vLLM with tensor parallel 2, and beside FSDP2, that takes adapters alone; graphs and sleep mode on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.launches import assert_equal, assert_pushed, found, launch
from trl_turbo.engine.parity import TOLERANCE

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.trl]

if torch.cuda.device_count() < 2:
    pytest.skip(f"two CUDA devices are needed, and there are {torch.cuda.device_count()}", allow_module_level=True)
pytest.importorskip("peft")

ROUNDING = TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("labels", [("folded, asleep", "control"), ("fsdp", "fsdp, one rank reads")])
def test_each_sync_pushes_the_adapter_alone(labels: tuple[str, ...], tmp_path: Path) -> None:
    result = launch(
        "parallel_worker", ";".join(labels), out=tmp_path, NCCL_NVLS_ENABLE="0", VLLM_ALLREDUCE_USE_SYMM_MEM="0"
    )
    ranks = found(tmp_path, result)
    for rank in ranks:
        for label in labels:
            if label == "control":  # a model so small rounds by a fraction of the tolerance
                assert max(rank[label]["gaps"]) > 3 * max(rank[labels[0]]["gaps"]), rank[label]["gaps"]
            else:
                assert_pushed(rank[label], ROUNDING)
                assert rank[label]["folds"]["restored"]
            assert set(rank[label]["levels"]) == ({1} if label == "folded, asleep" else set())
        assert rank[labels[0]]["folds"]["changed"] or rank[labels[-1]]["folds"]["changed"]
    assert_equal(ranks, labels[0])
    assert result.returncode == 0, result.stderr[-4000:]
