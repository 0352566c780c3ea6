"""What only a CUDA machine can run: fp16 with a gradient scaler, bf16, and Liger's kernels in the same script."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from .adapters import lora
from .parity import TRL_HAS_FUSED_HEAD, check, patched, skip_unless_known, stock
from .rule import assert_same
from .runs import Case, classes, run

pytestmark = [pytest.mark.trl, pytest.mark.gpu]

ON_CUDA = {"use_cpu": False, "max_steps": 2}
UNCLIPPED = {**ON_CUDA, "beta": 0.1, "epsilon": 0.99, "epsilon_high": 100.0}
OPTIONS: dict[str, dict[str, Any]] = {"GRPO": UNCLIPPED, "RLOO": UNCLIPPED, "DPO": ON_CUDA, "OnlineDPO": ON_CUDA}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("peft", [None, lora(), lora("q_proj", "lm_head")], ids=["full", "lora", "lora-on-head"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("trainer", OPTIONS)
def test_cuda(trainer: str, precision: str, peft: Any) -> None:
    """fp16 runs under a gradient scaler, which skips steps until its scale fits; the same ones stock and patched."""
    low = {} if precision == "fp32" else {precision: True}
    if peft is not None and "lm_head" in peft().target_modules and TRL_HAS_FUSED_HEAD and trainer != "OnlineDPO":
        pytest.skip("TRL 1.15 and later refuse an adapter on the head")
    options = {**OPTIONS[trainer], **low, "max_steps": 8}  # the scaler may skip the first ones
    check(Case(trainer, options, "qwen2-untied", dtype=DTYPES[precision], peft=peft))


@pytest.mark.parametrize("trainer", ["GRPO", "DPO"])
def test_kernel_is_used_on_cuda_where_it_measures_faster(trainer: str) -> None:
    """With the choice as it is: a frozen head is scored by our kernel on every TRL."""
    with patched() as path:
        run(Case(trainer, OPTIONS[trainer], "qwen2-untied", peft=lora()))
    assert any(call.grad for call in path.kernel)


@needs_liger
@pytest.mark.parametrize("trainer", ["GRPO", "DPO"])
def test_liger_in_the_same_script(trainer: str) -> None:
    """Liger stands in front of the instance's forward; up to 1.14 TRL also scores with it, and the report says so."""
    case = Case(trainer, {**OPTIONS[trainer], "use_liger_kernel": True}, "qwen2-untied")
    skip_unless_known(case)
    plain, *perturbed = stock(case)
    with patched() as path:
        ours = run(case)
    assert_same(plain, ours, perturbed)
    around = any(hasattr(classes(trainer)[0], name) for name in ("compute_liger_loss", "_compute_loss_liger"))
    assert any("use_liger_kernel" in note for note in path.notes) == around
    if trainer == "GRPO" or not around:
        assert path.kernel, "the old and reference passes are ours with Liger too"
