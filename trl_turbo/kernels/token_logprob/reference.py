"""The truth, in plain torch."""

from __future__ import annotations

import torch


def token_logprob_reference(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `op.token_logprob`; in float64 where the logits are."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    chosen = wide.gather(-1, tokens.long().unsqueeze(-1))
    logps = (chosen - wide.logsumexp(-1, keepdim=True)).squeeze(-1)
    return logps, (wide >= chosen).sum(-1)
