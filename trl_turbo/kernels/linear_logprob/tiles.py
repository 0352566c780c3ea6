"""What happens to one tile of logits, in torch: the CPU's path, and the twin that each Triton kernel is tested against.

The statistics of a row are running sums in the rows of `stats` [7, n], in the order of the constants below. `fold`
takes one tile of the vocabulary into them, as in the online softmax (Milakov and Gimelshein, arXiv:1805.02867).
"""

from __future__ import annotations

import torch

from .reference import transform_logits
from .spec import LinearLogprobOutput, Transform

# Rows of `stats`. Sums are of exp(z - MAX) and move with it; TARGET starts as NaN, so that a target outside of the
# vocabulary gives NaN and never another token's value.
MAX, SUM, SHIFTED, SQUARES, LOGITS, BEFORE, TARGET = range(7)
N_STATS = 7


def fold(
    tile: torch.Tensor,  # [n, w] raw head outputs
    bias: torch.Tensor | None,  # [w]
    targets: torch.Tensor,  # [n]
    stats: torch.Tensor,  # [7, n]
    acc: torch.Tensor | None,  # [n, A]
    vocab_start: int,
    transform: Transform,
    outputs: tuple[str, ...],
) -> None:
    """Fold a tile into `stats`; with `acc`, also turn it into the weights of the next product.

    With `acc` the tile becomes exp(z - MAX) dz/dx (less the constant slope), with 0 at the target, and `acc` is
    rescaled to the new MAX, so that `acc += tile @ weight` goes on. The target's own term stays out because it would
    cancel against the row of the target's weight: rounded to bf16, its softcap slope alone would cost more than 1 - p
    is worth.
    """
    z = tile.to(stats.dtype)
    if bias is not None:
        z = z + bias.to(stats.dtype)
    z = transform_logits(z, transform)
    if vocab_start == 0:
        stats.zero_()
        stats[MAX] = stats[BEFORE] = -torch.inf
        stats[TARGET] = torch.nan
    local = (targets - vocab_start).unsqueeze(-1)
    columns = torch.arange(tile.shape[1], device=tile.device)
    is_target = columns == local
    m_old = stats[MAX].clone()
    m = torch.maximum(m_old, z.amax(-1))
    anchor = m.masked_fill(m == -torch.inf, 0.0)  # a tile of -inf alone must not make -inf - -inf
    rescale = (m_old - anchor).exp()
    shifted = z - anchor.unsqueeze(-1)
    e = shifted.exp()
    if "entropy" in outputs:
        moved = torch.where(rescale > 0, (m_old - anchor) * stats[SUM], 0.0)
        stats[SHIFTED] = (stats[SHIFTED] + moved) * rescale + (e * shifted.masked_fill(e == 0, 0.0)).sum(-1)
    if "logsumexp2" in outputs:
        stats[SQUARES] = stats[SQUARES] * rescale * rescale + (e * e).sum(-1)
    if "mean_logit" in outputs:
        stats[LOGITS] += z.sum(-1)
    if "top1" in outputs:
        stats[BEFORE] = torch.maximum(stats[BEFORE], z.masked_fill(columns >= local, -torch.inf).amax(-1))
    stats[SUM] = stats[SUM] * rescale + e.sum(-1)
    stats[MAX] = m
    stats[TARGET] = torch.where(is_target.any(-1), z.masked_fill(~is_target, 0.0).sum(-1), stats[TARGET])
    if acc is None:
        return
    if transform.softcap is not None:
        e = e * _softcap_slope(z, transform)
    tile.copy_(e.masked_fill(is_target, 0.0))
    if vocab_start > 0:
        acc.mul_(rescale.unsqueeze(-1))


def jacobian(
    acc: torch.Tensor,  # [n, H] sum over the vocabulary of what `fold` left in the tiles, times the weight
    stats: torch.Tensor,  # [7, n]
    weight: torch.Tensor,  # [V, H]
    targets: torch.Tensor,  # [n]
    transform: Transform,
    out: torch.Tensor,  # [n, H]
) -> None:
    """Write d logps / d hidden: slope * ((1 - p_target) dz_target W[target] - sum over the others of p dz W)."""
    log_p = stats[TARGET] - stats[MAX] - stats[SUM].log()
    own = -torch.expm1(log_p)
    if transform.softcap is not None:
        own = own * _softcap_slope(stats[TARGET], transform)
    rows = weight[targets.clamp(0, weight.shape[0] - 1)].to(stats.dtype)
    out.copy_((rows * own.unsqueeze(-1) - acc / stats[SUM].unsqueeze(-1)) * transform.slope)


def grad_tile(
    tile: torch.Tensor,  # [n, w] raw head outputs, overwritten with the gradient of the loss for them
    bias: torch.Tensor | None,  # [w]
    targets: torch.Tensor,  # [n]
    norm: torch.Tensor,  # [2, n] as from `norm_of`
    entropy: torch.Tensor | None,  # [n]
    grad_logps: torch.Tensor | None,  # [n]
    grad_entropy: torch.Tensor | None,  # [n]
    vocab_start: int,
    transform: Transform,
) -> None:
    """d loss / dx = slope * dz * (g_logps (1[target] - p) - g_entropy p (log p + entropy))."""
    dtype = norm.dtype
    z = tile.to(dtype)
    if bias is not None:
        z = z + bias.to(dtype)
    z = transform_logits(z, transform)
    log_p = z - norm[0].unsqueeze(-1) - norm[1].unsqueeze(-1)
    p = log_p.exp()
    grad = torch.zeros_like(z)
    if grad_logps is not None:
        columns = torch.arange(tile.shape[1], device=tile.device)
        is_target = columns == (targets - vocab_start).unsqueeze(-1)
        grad += grad_logps.unsqueeze(-1) * (is_target.to(dtype) - p)
    if grad_entropy is not None:
        if entropy is None:
            raise ValueError(
                "grad_entropy was given without the entropy that it is made from; pass entropy as the forward gave it."
            )
        surprise = log_p.masked_fill(p == 0, 0.0) + entropy.unsqueeze(-1)
        grad -= grad_entropy.unsqueeze(-1) * p * surprise
    if transform.softcap is not None:
        grad *= _softcap_slope(z, transform)
    tile.copy_(grad * transform.slope)


def norm_of(stats: torch.Tensor) -> torch.Tensor:  # [7, N]
    """MAX and log SUM [2, N]: kept apart, because rounding their sum at 20 moves a float32 p by 1e-6."""
    return torch.stack((stats[MAX], stats[SUM].log()))


def finish(
    stats: torch.Tensor,  # [7, N]
    vocab: int,
    outputs: tuple[str, ...],
) -> LinearLogprobOutput:
    """The statistics that were asked for, from the running sums over the whole vocabulary."""
    m, log_sum = stats[MAX], stats[SUM].log()
    answers = {
        "logps": lambda: stats[TARGET] - m - log_sum,
        "entropy": lambda: log_sum - stats[SHIFTED] / stats[SUM],
        "logsumexp": lambda: m + log_sum,
        "logsumexp2": lambda: 2 * m + stats[SQUARES].log(),
        "mean_logit": lambda: stats[LOGITS] / vocab,
        "top1": lambda: (stats[TARGET] >= m) & (stats[TARGET] > stats[BEFORE]),
    }
    return LinearLogprobOutput(**{name: answers[name]() for name in outputs})


def _softcap_slope(z: torch.Tensor, transform: Transform) -> torch.Tensor:
    """1 - tanh(x / c)^2 from the transformed logits `z`."""
    if transform.softcap is None:
        return torch.ones_like(z)
    return 1 - (z * (transform.temperature / transform.softcap)).square()
