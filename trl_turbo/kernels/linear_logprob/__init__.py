"""From hidden states to per-token log-probabilities, entropies and the rest, without the logits."""

from .head import head_logprob
from .op import linear_logprob
from .spec import OUTPUTS, LinearLogprobOutput

__all__ = ["OUTPUTS", "LinearLogprobOutput", "head_logprob", "linear_logprob"]
