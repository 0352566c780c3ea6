"""`paged_decode` in plain torch against attention over a whole sequence, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.paged_attention.cases import Case, made
from trl_turbo.kernels.paged_attention import paged_decode


def test_as_attention_over_the_whole_sequence():
    case = made(Case(lengths=(5, 1, 17), heads=4, kv_heads=2, dim=16, rotary=0), torch.float32, "cpu")
    out = paged_decode(*case.arguments, scale=0.25)
    for row, length in enumerate(case.lengths):
        k, v = (torch.stack([cache[b, i] for b, i in case.places(row)]) for cache in case.arguments[3:5])
        query, k, v = (x.transpose(0, 1) for x in (case.arguments[0][row : row + 1], k, v))  # [heads, tokens, D]
        wanted = scaled_dot_product_attention(query, k, v, scale=0.25, enable_gqa=True)
        torch.testing.assert_close(out[row], wanted[:, 0])
        assert k.shape[1] == length


def test_what_does_not_fit():
    case = made(Case(lengths=(5,), heads=4, kv_heads=2, dim=16, rotary=0), torch.float32, "cpu")
    query, *rest = case.arguments
    with pytest.raises(ValueError, match=r"Hq a multiple of Hk; found \[1, 3, 16\]"):
        paged_decode(query[:, :3], *rest, scale=1.0)
    with pytest.raises(ValueError, match=r"share one of float32, float16 and bfloat16; found torch.float16"):
        paged_decode(query.half(), *rest, scale=1.0)
