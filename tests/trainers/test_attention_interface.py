"""Our attention under its own name in transformers: what a script gets that asks for it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any
from unittest.mock import patch as replaced

import pytest
import torch
import transformers

import trl_turbo
from trl_turbo.patches.attention import interface
from trl_turbo.patches.attention.layout import NAME

from .block_models import make, tokens
from .models import folder, load

pytestmark = pytest.mark.trl

FAMILIES = ["llama", "mistral", "gemma2", "gemma3-text", "qwen3", "qwen3-moe", "phi3", "cohere"]
WINDOWED = ("mistral", "gemma2", "gemma3-text")
ULPS = 64  # of the largest logit, in float32: layers of sums in another order


@pytest.fixture(autouse=True)
def _on() -> None:
    trl_turbo.patch(verbose=False, attention=True)


def close(ours: torch.Tensor, stock: torch.Tensor) -> bool:
    return bool((ours - stock).abs().max() <= ULPS * torch.finfo(torch.float32).eps * stock.abs().max())


def both(family: str) -> tuple[Any, Any]:
    return make(family, attn_implementation=NAME), make(family)


def padded(ids: torch.Tensor) -> torch.Tensor:
    """A mask that leaves out 0, 3, 6 ... tokens on the left."""
    return (torch.arange(ids.shape[1]) >= 3 * torch.arange(len(ids))[:, None]).long()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_forward_and_gradients(family: str, masked: bool) -> None:
    """Plainly causal calls run on our kernel, in models without windows, and the others on sdpa; all are eager's."""
    model, stock = both(family)
    ids = tokens()
    mask = padded(ids) if masked else None
    with replaced.object(interface, "attention", wraps=interface.attention) as kernel:
        ours = model(input_ids=ids, attention_mask=mask).logits
    logits = stock(input_ids=ids, attention_mask=mask).logits
    where = torch.ones_like(ids) if mask is None else mask
    assert close(ours[where != 0], logits[where != 0])
    if masked or family not in WINDOWED:  # whose masks transformers 4 makes where it could do without
        assert bool(kernel.call_count) != masked
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)) * where[..., None]
    for mine, theirs in zip(
        torch.autograd.grad(ours, list(model.parameters()), weights, allow_unused=True),
        torch.autograd.grad(logits, list(stock.parameters()), weights, allow_unused=True),
        strict=True,
    ):
        assert (mine is None) == (theirs is None)
        if theirs is not None and theirs.abs().max() > 1e-4:
            assert close(mine, theirs)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_generation(family: str) -> None:
    """Prefill and decoding with a cache, of prompts that are padded on the left: greedy tokens are eager's."""
    model, stock = (model.eval() for model in both(family))
    ids = tokens()[:, :9]
    kwargs: dict[str, Any] = {"attention_mask": padded(ids).clamp(max=1), "max_new_tokens": 12, "do_sample": False}
    kwargs["attention_mask"][3] = 1
    assert torch.equal(model.generate(ids, **kwargs), stock.generate(ids, **kwargs))


def test_from_pretrained_and_back(tmp_path: Any) -> None:
    """The name goes into no file, and a model that was made with it is an ordinary one."""
    model = load(folder("llama"), attn_implementation=NAME)
    assert model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert load(str(tmp_path)).config._attn_implementation == "sdpa"
    stock = load(folder("llama"))
    stock.set_attn_implementation(NAME)
    assert close(stock(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_dropout_and_sinks() -> None:
    """Dropout is sdpa's; attention sinks are refused in a sentence."""
    model = make("llama", attn_implementation=NAME, attention_dropout=0.5).train()
    with replaced.object(interface, "attention", side_effect=AssertionError("has no dropout")):
        assert not torch.equal(model(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    q = torch.randn(1, 4, 8, 16)
    with pytest.raises(NotImplementedError, match=r"attention sinks.*load the model with"):
        interface.attention_forward(torch.nn.Module(), q, q, q, None, s_aux=torch.zeros(4))


def test_the_name_is_gone_after_unpatch() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert NAME in ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert NAME in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    trl_turbo.unpatch()
    assert NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert NAME not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    with pytest.raises((ValueError, KeyError), match=NAME):
        load(folder("llama"), attn_implementation=NAME)
    assert transformers.__version__


def test_without_logprob_where_trl_is_there_already() -> None:
    """Our attention alone imports the forward that it is patched into then, if anything does."""
    script = (
        "import trl.trainer.grpo_trainer, trl_turbo\n"
        "report = trl_turbo.patch(logprob=False, attention=True, packing=True, verbose=False)\n"
        "print(*(f'{row.name} {row.status}' for row in report), sep=chr(10))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    rows = dict(line.split() for line in done.stdout.splitlines())
    assert rows["attention.passes"] in ("applied", "pending")
    assert "failed" not in rows.values()
