"""The Triton kernel against plain torch; run by `test_triton.py` with Triton's interpreter on or off."""

from __future__ import annotations

import pytest
import torch

from trl_turbo.kernels.token_logprob.kernel import PIECE, token_logprob_triton
from trl_turbo.kernels.token_logprob.reference import token_logprob_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width"), [(1, 1), (3, 7), (5, PIECE), (2, PIECE + 1), (8, 3 * PIECE - 5), (0, 9)])
def test_as_plain_torch(n, width, dtype):
    torch.manual_seed(n + width)
    whole = 8 * torch.randn(n, width + 3, device=DEVICE)
    logits = whole.to(dtype)[:, :width]  # rows further apart than they are long
    tokens = torch.randint(width, (n,), device=DEVICE)
    if width > PIECE and n:
        logits[0, :PIECE] = float("-inf")  # a piece where every token is excluded
        tokens[0] = width - 1
    logps, ranks = token_logprob_triton(logits, tokens)
    truth, counts = token_logprob_reference(logits.double(), tokens)
    # The logits are exact; what rounds is a float32 sum of positive numbers in pieces (relative, so absolute in its
    # logarithm), and a subtraction of numbers of up to about 40
    assert (logps.double() - truth).abs().max().item() <= 32 * 2**-23 if n else True
    assert torch.equal(ranks, counts)


def test_a_nan_shows():
    logits = torch.zeros(1, 8, device=DEVICE)
    logits[0, 3] = float("nan")
    logps, _ = token_logprob_triton(logits, torch.zeros(1, dtype=torch.long, device=DEVICE))
    assert logps.isnan().all()
