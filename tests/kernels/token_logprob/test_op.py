"""`token_logprob` in plain torch, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from trl_turbo.kernels.token_logprob import token_logprob


def test_log_softmax_and_rank():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, float("-inf"), -1.0, float("-inf")]])
    logps, ranks = token_logprob(logits, torch.tensor([2, 0]))
    torch.testing.assert_close(logps, logits.log_softmax(-1)[[0, 1], [2, 0]])
    assert ranks.tolist() == [3, 1]


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"logits \[N, V\] and tokens \[N\]; found \[2, 4\] and \[3\]"):
        token_logprob(torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))
