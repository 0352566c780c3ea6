"""The same statistics through a head that is no plain matrix: quantised, DoRA, hooked, or any callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from trl_turbo.kernels.autograd import once_differentiable

from . import checks, passes, plan, tiles
from .op import make_spec
from .spec import OUTPUTS, LinearLogprobOutput, Spec

# Logits, their gradient, and two more for what a head like DoRA's makes on the way
_COPIES = 4
_UNKNOWN_VOCAB = 262_144


def head_logprob(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,  # [N, H]
    targets: torch.Tensor,  # [N]
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = ("logps",),
    entropy_grad: bool = False,
    byte_budget: int | None = None,
) -> LinearLogprobOutput:
    """`linear_logprob` for any `head` that maps [n, H] to logits [n, V], called on a few rows at a time.

    Under autograd each call is checkpointed (non-reentrant, with the random state, so that dropout repeats): the
    backward runs the head once more, and logits of at most `byte_budget` exist at any time, 256 MiB by default.

    Args:
        head: a module or function; its own parameters get their gradients through autograd.
        hidden: [N, H], of whatever dtype the head takes.
        targets: [N] int64.
        temperature: see `linear_logprob`, as for all that follow.
        softcap: above 0, or `None`; leave it out where the head applies it.
        logit_scale: likewise.
        outputs: some of `OUTPUTS`.
        entropy_grad: whether gradients flow through the entropy.
        byte_budget: for the logits and what the head and the gradient make of the same size.

    Raises:
        ValueError: shapes or numbers that do not fit, also of what the head returns.
    """
    if hidden.ndim != 2:
        raise ValueError(
            f"hidden must be [N, H], and its shape is {list(hidden.shape)}; flatten batch and sequence first."
        )
    checks.check_targets_shape(hidden.shape[0], targets.device, targets)
    targets = targets.contiguous()  # the kernels read them by row
    budget = byte_budget or 256 * plan.MIB
    dtype = torch.get_autocast_dtype(hidden.device.type)
    if not torch.is_autocast_enabled(hidden.device.type):
        dtype = hidden.dtype
    spec = make_spec(temperature, softcap, logit_scale, outputs, entropy_grad, byte_budget, dtype)

    def rows_of(vocab: int) -> int:
        return max(budget // (vocab * dtype.itemsize * _COPIES), 1)

    def scored(hidden_rows: torch.Tensor, target_rows: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _score(head(hidden_rows), target_rows, spec)

    rows = rows_of(_vocab(head) or _UNKNOWN_VOCAB)
    parts: list[tuple[torch.Tensor | None, ...]] = []
    n = hidden.shape[0]
    # One call that holds everything keeps its logits, which the budget covers; more of them make theirs again
    again = torch.is_grad_enabled() and n > rows
    for r0 in range(0, max(n, 1), rows):
        piece = hidden[r0 : r0 + rows], targets[r0 : r0 + rows]
        if again:
            parts.append(checkpoint(scored, *piece, use_reentrant=False, preserve_rng_state=True))
        else:
            parts.append(scored(*piece))
    return LinearLogprobOutput(
        *(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
    )


def _vocab(head: Any) -> int | None:
    """The vocabulary of a module that says it; a packed 4-bit weight does not, so its shape is not asked."""
    found = getattr(head, "out_features", None)
    return found if isinstance(found, int) and found > 0 else None


def _score(
    logits: torch.Tensor,  # [n, V]
    targets: torch.Tensor,  # [n]
    spec: Spec,
) -> tuple[torch.Tensor | None, ...]:
    if logits.ndim != 2 or logits.shape[0] != targets.shape[0] or not logits.is_floating_point():
        raise ValueError(
            f"The head must return floating-point logits [{targets.shape[0]}, V], and it returned {list(logits.shape)} "
            f"in {str(logits.dtype).removeprefix('torch.')}."
        )
    checks.check_targets_shape(logits.shape[0], logits.device, targets)
    if logits.device.type == "cpu":
        checks.check_targets_range(targets, logits.shape[1])
    return _TileLogprob.apply(logits, targets, spec)


class _TileLogprob(torch.autograd.Function):
    """Statistics of logits that are already there, read in slices so that no float32 copy of them is made."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,  # [n, V]
        targets: torch.Tensor,  # [n]
        spec: Spec,
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        n, vocab = logits.shape
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        stats = torch.empty((tiles.N_STATS, n), device=logits.device, dtype=dtype)
        outputs = spec.outputs
        ops = passes.backend(logits.device, logits.dtype)
        with passes.plain(logits.device):
            rows = logits if logits.stride(1) == 1 else logits.contiguous()
            for v0 in range(0, vocab, plan.COLUMNS):
                ops.fold(rows[:, v0 : v0 + plan.COLUMNS], None, targets, stats, None, v0, spec.transform, outputs)
        answer = tiles.finish(stats, vocab, outputs)
        ctx.spec = spec
        ctx.save_for_backward(logits, targets, tiles.norm_of(stats), answer.entropy)
        answer = LinearLogprobOutput(
            *(x if name in spec.outputs else None for name, x in zip(OUTPUTS, answer, strict=True))
        )
        carries = {"logps", "entropy"} if spec.entropy_grad else {"logps"}
        ctx.mark_non_differentiable(
            *(x for name, x in zip(OUTPUTS, answer, strict=True) if x is not None and name not in carries)
        )
        return tuple(answer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: None) -> Any:
        if grad_logps is None and grad_entropy is None:
            return None, None, None
        logits, targets, norm, entropy = ctx.saved_tensors
        grad_logps, grad_entropy = (
            None if grad is None else grad.to(norm.dtype).contiguous() for grad in (grad_logps, grad_entropy)
        )
        grad = logits.clone(memory_format=torch.contiguous_format)  # kept whole, so that a second backward is right
        ops = passes.backend(logits.device, logits.dtype)
        with passes.plain(logits.device):
            for v0 in range(0, grad.shape[1], plan.COLUMNS):
                tile = grad[:, v0 : v0 + plan.COLUMNS]
                ops.grad_tile(tile, None, targets, norm, entropy, grad_logps, grad_entropy, v0, ctx.spec.transform)
        return grad, None, None
