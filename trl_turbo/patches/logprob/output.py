"""What a causal language model returns from a scoring pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils.generic import ModelOutput

from trl_turbo.patches.logprob.request import active_request
from trl_turbo.patches.logprob.scored import ScoredLogits


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """Statistics in place of logits; the field names are those of TRL's class of the same name (1.15 and later).

    Args:
        loss: Negative log-likelihood summed over the scored tokens and divided by their number, or by
            `num_items_in_batch`.
        log_probs: `[B, T]` float32, zero where nothing was asked; `T` is `L - 1` when called with `labels`, `L` within
            a trainer's scope.
        entropy: `[B, T]`, in nats.
        log_sum_sq_probs: `[B, T]`, `log(sum_v p_v^2)`.
        mean_logits: `[B, T]`, mean over the vocabulary.
        is_top1: `[B, T]` bool, whether the label is the most likely token.
        label_mask: `[B, T]` bool, whether a token was asked about.
        aux_loss: Load-balancing loss of a mixture of experts, where the model returns one.
        logsumexp: `[B, T]`.
        logsumexp2: `[B, T]`, of the doubled logits.
        targets: `[B, T]` int64.
        vocab: `[1]` int64, size of the vocabulary.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    logsumexp: torch.Tensor | None = None
    logsumexp2: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    vocab: torch.Tensor | None = None

    @property
    def logits(self) -> ScoredLogits:
        """The stand-in that a trainer's own code works on."""
        request = active_request()
        if request is None or self.vocab is None:
            raise AttributeError("this output carries no logits: the model was called to score tokens")
        names = ("targets", "log_probs", "entropy", "logsumexp", "logsumexp2", "mean_logits", "is_top1")
        stats = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return ScoredLogits(stats, request.temperature, int(self.vocab))
