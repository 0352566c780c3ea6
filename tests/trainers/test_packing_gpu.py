"""Packed rows on CUDA: whole trainings against stock, and a model of real head sizes under the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_turbo
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.patches.attention import passes
from trl_turbo.patches.logprob.request import IGNORED, completion_targets

from .adapters import lora
from .block_models import make
from .parity import check
from .runs import Case

pytestmark = [pytest.mark.trl, pytest.mark.gpu]

ON_CUDA = {"use_cpu": False, "max_steps": 2}
UNCLIPPED = {**ON_CUDA, "beta": 0.1, "epsilon": 0.99, "epsilon_high": 100.0}
OPTIONS: dict[str, dict[str, Any]] = {"GRPO": UNCLIPPED, "RLOO": UNCLIPPED, "DPO": ON_CUDA, "OnlineDPO": ON_CUDA}
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
PROMPT, COMPLETION = 200, 77


@pytest.fixture(autouse=True)
def _packing(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("TRL_TURBO_PACKING", "1")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("trainer", OPTIONS)
def test_trainer(trainer: str, precision: str) -> None:
    low = {} if precision == "fp32" else {precision: True}
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    check(Case(trainer, {**OPTIONS[trainer], **low, **CHECKPOINTED}, "qwen2-untied", dtype=dtype, peft=lora()))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3-text", "mistral"])
def test_logits_and_gradients(family: str) -> None:
    """Head dim 64, two groups of unequal rows: log-probs and gradients in bf16 no farther from float32 than stock's."""
    trl_turbo.patch(verbose=False, packing=True)
    shape = {"head_dim": 64, "hidden_size": 256, "max_position_embeddings": 512}
    exact = make(family, **shape, **({"query_pre_attn_scalar": 64} if "gemma" in family else {})).cuda()
    model = make(family, torch.bfloat16, **shape, **({"query_pre_attn_scalar": 64} if "gemma" in family else {})).cuda()
    numbers = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 200, (6, PROMPT + COMPLETION), generator=numbers)
    ids[:3, :PROMPT], ids[3:, :PROMPT] = ids[0, :PROMPT].clone(), ids[3, :PROMPT].clone()
    column = torch.arange(PROMPT + COMPLETION).expand_as(ids)
    ends = PROMPT + torch.tensor([77, 1, 30, 64, 65, 16])[:, None]
    starts = torch.tensor([0, 0, 0, 50, 50, 50])[:, None]
    mask = ((column >= starts) & (column < ends)).long()
    ids, mask = (ids * mask).cuda(), mask.cuda()
    targets = completion_targets(COMPLETION)(ids, mask)
    asked = targets != IGNORED
    weights = torch.randn(int(asked.sum()), generator=numbers).cuda()

    def results(model: Any, packed: bool) -> list[torch.Tensor]:
        kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        arranged = None
        if packed:
            arranged = passes.arrange("packing", model, type(model).forward, (), kwargs, targets)
            assert arranged is not None, trl_turbo.status().notes
            assert max(arranged.layout.segments.prefix) >= 0
            kwargs = arranged.kwargs
        logps = model(**kwargs).logits.float().log_softmax(-1)[..., 5]
        logps = (logps if arranged is None else arranged.spread(logps))[asked]
        grads = torch.autograd.grad(logps, list(model.parameters()), weights, allow_unused=True)
        return [logps.detach(), *(g for g in grads if g is not None)]

    truth = results(exact, False)
    stock, ours = results(model, False), results(model, True)
    for i, (mine, theirs, true) in enumerate(zip(ours, stock, truth, strict=True)):
        if true.abs().amax() > 1e-6:  # the bias of a key projection has a gradient of rounding alone
            assert excess_error(mine, theirs, true, 1.0) <= 1, i
