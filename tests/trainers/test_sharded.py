"""FSDP2 and DeepSpeed ZeRO-2 and ZeRO-3 in two processes, gloo, on the CPU: patched equals stock, without logits.

FSDP2 is torch's. DeepSpeed is tested where it is installed: `tox run -e deepspeed`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from trl_turbo.kernels.linear_logprob.reference import excess_error

from .launched import PADDED, TORCHRUN, equal_on_ranks, launched, of_ranks
from .rule import assert_same
from .shard_worker import BUDGET_BYTES, FEATURES, IN_BF16, KINDS, WITHOUT_LOGITS, cases
from .sharded import ENVIRONMENT

pytestmark = [pytest.mark.trl, pytest.mark.slow]

LABELS = [(kind, label) for kind in KINDS for label in cases(kind)]
# Whether LoRA's kernels run: ZeRO-3 gathers a linear for its own call alone
LORA = {"fsdp2": True, "zero2": True, "zero3": False}
FLOAT32_BYTES = 4
SLACK = 0.1  # of root mean square error, as in the tests of kernels
CASES = {label: case for kind in KINDS for label, case in cases(kind).items()}


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, for every training of a kind."""
    kind = request.param
    if kind != "fsdp2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; tox run -e deepspeed has it")
    return of_ranks(launched(tmp_path_factory, "shard_worker", kind, python=TORCHRUN, env=PADDED | ENVIRONMENT[kind]))


@pytest.mark.parametrize(("ranks", "label"), LABELS, indirect=["ranks"])
def test_two_processes(ranks: list[dict[str, Any]], label: str) -> None:
    ours = equal_on_ranks(ranks, label)
    assert ours[0].series["training loss"] != ours[1].series["training loss"], "both ranks had the same data"
    for rank in ranks:
        found = rank[label]
        found["path"].assert_ours()
        assert any(update.any() for update in found["patched"].tensors["update"].values())
        case = CASES[label]
        assert found["path"].kernel[0].dtype == case.dtype, "FSDP2 did not cast what the model computes with"
        assert_same(found["stock"], found["patched"], found["perturbed"], case.dtype)


@pytest.mark.parametrize(("ranks", "label"), [("fsdp2", label) for label in IN_BF16], indirect=["ranks"])
def test_rounding_is_no_worse_than_stocks(ranks: list[dict[str, Any]], label: str) -> None:
    """In bf16 a loss says little: it is of a few tokens, whose log-probs both runs round to three digits.

    So log-probs of many tokens, and gradients through them, are compared with those of the same weights in float32.
    """
    equal_on_ranks(ranks, label)
    for rank in ranks:
        ours, stock, true = (rank[label]["scores"][run] for run in ("patched", "stock", "true"))
        assert ours.keys() == stock.keys() == true.keys() > {"logps"}
        for name, tensor in true.items():
            few = tensor.numel() < 1000  # which add up the same few roundings
            slack = 1.0 if few else SLACK + 3 / tensor.numel() ** 0.5
            assert excess_error(ours[name], stock[name], tensor, slack) <= 1, name
        together = [
            torch.cat([run[name].double().flatten() / true[name].double().norm() for name in true if name != "logps"])
            for run in (ours, stock, true)
        ]
        assert excess_error(*together, SLACK + 3 / together[0].numel() ** 0.5) <= 1


@pytest.mark.parametrize(("ranks", "label"), LABELS, indirect=["ranks"])
def test_kernels_are_on(ranks: list[dict[str, Any]], label: str, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["ranks"]
    adapted, everywhere = "lora" in label or "saved" in label, "lora" in label and not label.startswith("DPO")
    expected = {"rms_norm", "rope"}
    if adapted and LORA[kind]:
        expected |= {"lora_linear", "lora_qkv"}
    if everywhere and LORA[kind]:
        expected |= {"lora_mlp"}
    if not everywhere:
        expected |= {"gated"}
    if label == "GRPO" and kind != "zero3":
        expected |= {"tiled"}
    for rank in ranks:
        ran, notes = set(rank[label]["ran"]), rank[label]["path"].others
        assert expected <= ran
        assert LORA[kind] or not any(name.startswith("lora") for name in ran)
        assert any("before its tiles are made again" in note for note in notes) == (label == "GRPO" and kind == "zero3")
        assert any("ZeRO-3 gathers" in note for note in notes) == (adapted and not LORA[kind])


@pytest.mark.parametrize(("ranks", "label"), [pair for pair in LABELS if pair[1] in FEATURES], indirect=["ranks"])
def test_attention_and_packing_are_on(ranks: list[dict[str, Any]], label: str, request: pytest.FixtureRequest) -> None:
    """Every pass goes to our attention, on a packed row or the padded batch; ranks pass as often, over other tokens."""
    feature = "packing" if FEATURES[label].get("packing") else "attention"
    arranged = [rank[label]["arranged"] for rank in ranks]
    for rank, passes in zip(ranks, arranged, strict=True):
        assert passes
        # Where a batch has no padding and no shared prompt, it is left as it is, with our attention
        assert feature in {way for way, _ in passes} <= {feature, "attention"}
        assert rank[label]["ran"]["attention"] >= len(passes)
        notes = rank[label]["path"].others
        assert not any("its passes keep" in note for note in notes), notes
        # Chunks by tokens would be as many as this rank's tokens make
        chunked = feature == "packing" and label.startswith(("GRPO", "RLOO"))
        sharded = request.node.callspec.params["ranks"] != "zero2"
        assert any("keep TRL's chunks of rows" in note for note in notes) == (chunked and sharded)
    if request.node.callspec.params["ranks"] != "zero2":
        assert len(arranged[0]) == len(arranged[1])
    if feature == "packing":
        assert arranged[0] != arranged[1], "both ranks had as many tokens in each pass"


@pytest.mark.parametrize(
    ("ranks", "label"), [(kind, label) for kind in KINDS for label in WITHOUT_LOGITS], indirect=["ranks"]
)
def test_no_logits(ranks: list[dict[str, Any]], label: str) -> None:
    """Nothing but the head is as long as the vocabulary and larger than a tile; logits of stock's are seen."""
    for rank in ranks:
        sizes = rank[label]["sizes"]
        assert sizes["patched"][0] <= BUDGET_BYTES // FLOAT32_BYTES, sizes["patched"]
        assert "stock" not in sizes or sizes["stock"][0] > BUDGET_BYTES // FLOAT32_BYTES, sizes["stock"]
