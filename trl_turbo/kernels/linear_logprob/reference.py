"""The truth: the same statistics from the whole [N, V] logits in plain torch, differentiable by autograd throughout."""

from __future__ import annotations

import torch

from .spec import LinearLogprobOutput, Transform


def transform_logits(x: torch.Tensor, transform: Transform) -> torch.Tensor:
    """Scale, softcap and temper raw head outputs `x` [..., V]."""
    x = x * transform.logit_scale
    if transform.softcap is not None:
        x = transform.softcap * torch.tanh(x / transform.softcap)
    return x / transform.temperature


def reference_stats(z: torch.Tensor, targets: torch.Tensor) -> LinearLogprobOutput:
    """All six statistics of logits `z` [N, V] at `targets` [N]."""
    logsumexp = z.logsumexp(-1)
    log_p = z - logsumexp.unsqueeze(-1)
    p = log_p.exp()
    return LinearLogprobOutput(
        logps=z.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logsumexp,
        # A token that a -inf bias rules out has p = 0 and log p = -inf: it adds nothing
        entropy=-(p * log_p.masked_fill(p == 0, 0.0)).sum(-1),
        logsumexp=logsumexp,
        logsumexp2=(2 * z).logsumexp(-1),
        mean_logit=z.mean(-1),
        top1=z.argmax(-1) == targets,
    )


def linear_logprob_reference(
    hidden: torch.Tensor,  # [N, H]
    weight: torch.Tensor,  # [V, H]
    targets: torch.Tensor,  # [N]
    *,
    bias: torch.Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,  # ([N, R], [V, R])
    stats_dtype: torch.dtype | None = None,
) -> LinearLogprobOutput:
    """`linear_logprob` with the logits in memory, in the dtype of its inputs; the statistics in `stats_dtype`.

    In a low precision this is what plain torch gives (head in bf16, statistics in float32), the yardstick that the
    kernel's error is measured with; with float32 or float64 inputs it is the truth.
    """
    logits = hidden @ weight.T
    if low_rank is not None:
        a, b = low_rank
        logits = logits + a @ b.T
    if bias is not None:
        logits = logits + bias
    if stats_dtype is None:
        stats_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return reference_stats(
        transform_logits(logits.to(stats_dtype), Transform(temperature, softcap, logit_scale)), targets
    )


def excess_error(
    found: torch.Tensor,
    plain: torch.Tensor,
    truth: torch.Tensor,
    slack: float = 0.1,
) -> float:
    """The error of `found` over what is allowed, where plain torch in the same dtype sets the measure; above 1 fails.

    The root-mean-square error may exceed that of `plain` by `slack`; the largest one, which is a single element's
    luck, may be twice as large. A floor of 32 units in the last place of float32 (float64), at the scale of the
    truth, covers what plain torch happens to compute exactly, and that a backward which makes its logits again rounds
    them anew: logits near 20 by 20 units. Small samples scatter: 37 rows by 24 features did by 40%, 256 by 64 by 5%.
    """
    if truth.numel() == 0:
        return 0.0
    eps = torch.finfo(torch.promote_types(found.dtype, torch.float32)).eps
    floor = 32 * eps * truth.double().abs().amax() + torch.finfo(torch.float64).tiny
    mine, theirs = (found.double() - truth.double()).abs(), (plain.double() - truth.double()).abs()
    rms = mine.square().mean().sqrt() / ((1 + slack) * theirs.square().mean().sqrt() + floor)
    largest = mine.amax() / (2 * theirs.amax() + floor)
    return torch.maximum(rms, largest).item()  # NaN stays NaN, and is not <= 1
