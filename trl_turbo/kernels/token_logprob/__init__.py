"""Log-prob and rank of one token in each row of logits that are there already, as a sampler has them."""

from __future__ import annotations

from .op import token_logprob

__all__ = ["token_logprob"]
