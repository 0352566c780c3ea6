"""The public function."""

from __future__ import annotations

import torch

from .reference import token_logprob_reference


@torch.no_grad()
def token_logprob(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and rank of one token in each row, as vLLM's `compute_topk_scores` gives for the sampled tokens.

    Args:
        logits: [N, V], with columns next to each other, in any floating dtype; `-inf` excludes a token.
        tokens: [N], integer, each in `[0, V)`.

    Returns:
        Log-probs [N], float32, and ranks [N], int64: how many logits of the row are at least the token's, itself
        counted.

    Raises:
        ValueError: The shapes do not fit.
    """
    if logits.dim() != 2 or tokens.shape != logits.shape[:1]:
        raise ValueError(
            f"token_logprob takes logits [N, V] and tokens [N]; found {list(logits.shape)} and {list(tokens.shape)}"
        )
    if not logits.is_cuda or logits.stride(1) != 1:
        return token_logprob_reference(logits, tokens)
    from .kernel import token_logprob_triton

    return token_logprob_triton(logits, tokens)
