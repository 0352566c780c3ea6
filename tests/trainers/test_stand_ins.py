"""What stands in for logits answers for the tokens that were scored, and for no others."""

from __future__ import annotations

import pytest
import torch

from trl_turbo.patches.logprob.pending import UnsupportedLogitsOp
from trl_turbo.patches.logprob.request import IGNORED
from trl_turbo.patches.logprob.scored import ScoredLogits


def scored(temperature: float = 1.0) -> ScoredLogits:
    stats = {
        "targets": torch.tensor([[3, 4, IGNORED]]),
        "log_probs": torch.tensor([[-1.0, -2.0, 0.0]]),
        "is_top1": torch.tensor([[True, False, False]]),
    }
    return ScoredLogits(stats, temperature, vocab=9)


def test_another_token_than_the_scored_one_is_nan() -> None:
    asked = scored().log_probs_of(torch.tensor([[3, 5, 7]]))
    assert torch.equal(asked.isnan(), torch.tensor([[False, True, False]]))
    assert asked[0, 0] == -1.0
    assert asked[0, 2] == 0.0  # nothing was asked there, as under a mask


def test_answers_do_not_share_memory_with_what_is_kept() -> None:
    logits = scored()
    logits.log_probs_of(torch.tensor([[3, 4, 7]]))[:] = 0.0
    assert logits.stats["log_probs"].tolist() == [[-1.0, -2.0, 0.0]]


def test_another_temperature_or_shape_is_refused() -> None:
    with pytest.raises(UnsupportedLogitsOp, match="at temperature 0"):
        scored(0.5).log_probs_of(torch.tensor([[3, 4, 7]]))
    with pytest.raises(UnsupportedLogitsOp, match="log-probabilities of shape"):
        scored().log_probs_of(torch.tensor([[3, 4]]))
    assert scored()[:, :2].log_probs_of(torch.tensor([[3, 4]])).tolist() == [[-1.0, -2.0]]


def test_argmax_tells_hits_from_misses() -> None:
    logits = scored()
    hits = logits.argmax(dim=-1) == logits.stats["targets"]
    assert hits.tolist()[0][:2] == [True, False]
