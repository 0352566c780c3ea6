"""TRL 1.15 and later: its trainers call a fused head of TRL's own, through one global.

Ours takes that global's place where it measures faster (`docs/benchmarks.md`): on CUDA, with a frozen or a trained
head, as long as no gradient flows through the entropy. It also does where TRL's tile would be the whole [N, V], which
for up to 32,768 tokens of vocabulary it is. Everywhere else TRL's own function is called, as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import torch

from trl_turbo.compat.heads import describe_head
from trl_turbo.compat.sharded import is_zero3
from trl_turbo.kernels.linear_logprob import linear_logprob
from trl_turbo.patches.logprob.forward import configure
from trl_turbo.patches.logprob.hook import hook_models
from trl_turbo.patches.logprob.request import Request, entropy_gradient, entropy_has_gradient
from trl_turbo.patching import Replacement

NAME = "_ChunkedLogProbFunction"
# What TRL gathers a head with under ZeRO-3, around the call and in its function's backward
GATHER = "maybe_gather_lm_head_ctx"
# TRL's name of a statistic -> what it takes of ours
OUTPUTS = {
    "log_probs": ("logps",),
    "entropy": ("entropy",),
    "log_sum_sq_probs": ("logsumexp", "logsumexp2"),
    "mean_logits": ("mean_logit",),
    "is_top1": ("top1",),
}


def wanted(outputs: tuple[str, ...]) -> tuple[str, ...]:
    """Our statistics for TRL's names of them; the log-probability always."""
    names = [ours for theirs in outputs for ours in OUTPUTS[theirs]]
    return ("logps", *(name for name in names if name != "logps"))


def probe(module: ModuleType) -> str | None:
    """Why the module does not fit, or `None`."""
    function = getattr(module, NAME, None)
    if function is None:
        return f"{module.__name__} has no {NAME} (TRL before 1.15, or no Triton)"
    if not callable(getattr(function, "apply", None)):
        return f"{module.__name__}.{NAME} is no autograd function any more"
    return None


def build(module: ModuleType) -> Iterator[Replacement]:
    """TRL's autograd function, by a stand-in that chooses between both at each call."""
    yield Replacement(module, NAME, functools.partial(_faster_of_both, module))


def _faster_of_both(module: ModuleType, original: Any) -> Any:
    class FusedLogProb:
        """Stands for TRL's function of the same call."""

        @staticmethod
        def apply(
            hidden: torch.Tensor,  # [N, H]
            weight: torch.Tensor,  # [V, H]
            bias: torch.Tensor | None,  # [V]
            targets: torch.Tensor,  # [N]
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = tuple(OUTPUTS)[1:],
        ) -> tuple[torch.Tensor | None, ...]:
            differentiated = torch.is_grad_enabled() and "entropy" in outputs and entropy_has_gradient()
            gather = getattr(module, GATHER, None) if is_zero3(weight) else None
            if not ours_serves(hidden, weight, chunk_size, differentiated) or (is_zero3(weight) and gather is None):
                return original.apply(
                    hidden,
                    weight,
                    bias,
                    targets,
                    temperature,
                    chunk_size,
                    final_logit_softcapping,
                    logit_scale,
                    outputs,
                )
            with _kept_apart(gather, weight, bias):
                found = linear_logprob(
                    hidden,
                    weight,
                    targets,
                    bias=bias,
                    temperature=temperature,
                    softcap=final_logit_softcapping,
                    logit_scale=logit_scale,
                    outputs=wanted(outputs),
                    entropy_grad=differentiated,
                )
            squares = None
            if found.logsumexp is not None and found.logsumexp2 is not None:
                squares = found.logsumexp2 - 2 * found.logsumexp
            return found.logps, found.entropy, squares, found.mean_logit, found.top1

    return FusedLogProb


@contextmanager
def _kept_apart(gather: Any, *parameters: torch.Tensor | None) -> Iterator[None]:
    """Within this scope the `parameters` that backward needs are gathered for it once more: by then they are parts."""
    if gather is None:
        yield
        return
    whole = {(p.data_ptr(), p.shape): p for p in parameters if p is not None}

    def pack(saved: torch.Tensor) -> Any:
        # Autograd hands on a detached parameter, which would keep all of it in memory
        parameter = whole.get((saved.data_ptr(), saved.shape))
        return saved if parameter is None else (parameter,)

    def unpack(kept: Any) -> torch.Tensor:
        if not isinstance(kept, tuple):
            return kept
        with gather(*kept):
            return kept[0].detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def ours_serves(hidden: torch.Tensor, weight: torch.Tensor, chunk_size: int, entropy_differentiated: bool) -> bool:
    """Whether our kernel answers a call of TRL's function.

    Args:
        hidden: `[N, H]`.
        weight: `[V, H]`.
        chunk_size: Width of TRL's tile of logits.
        entropy_differentiated: Whether a gradient flows through the entropy.
    """
    # On CUDA, all but a differentiated entropy is in the committed benchmark; the CPU is not
    faster = hidden.device.type == "cuda" and not entropy_differentiated
    return faster or weight.shape[0] <= chunk_size


# The trainers of TRL >= 1.15 ---------------------------------------------------------------------------------------


def trainer_probe(module: ModuleType, trainer_name: str) -> str | None:
    """Why a trainer's module does not fit, or `None`."""
    if not hasattr(getattr(module, trainer_name, None), "_compute_loss"):
        return f"{module.__name__} has no {trainer_name}._compute_loss"
    missing = [name for name in ("add_fused_lm_head", "is_peft_model") if not hasattr(module, name)]
    return f"{module.__name__} no longer uses {', '.join(missing)}" if missing else None


def trainer_build(module: ModuleType, trainer_name: str) -> Iterator[Replacement]:
    """What a trainer must be told or allowed for our kernel to serve it."""
    trainer = getattr(module, trainer_name)
    yield Replacement(trainer, "_compute_loss", _saying_what_is_differentiated)
    if hasattr(module, "BaseTunerLayer"):
        yield Replacement(module, "BaseTunerLayer", _all_but_understood_heads)
        yield Replacement(module, "add_fused_lm_head", _ours_on_adapted_heads)


def _saying_what_is_differentiated(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        with entropy_gradient(getattr(self, "_entropy_bonus_enabled", False)):
            return original(self, *args, **kwargs)

    return _compute_loss


def _all_but_understood_heads(original: type) -> type:
    class Meta(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            if not isinstance(instance, original):
                return False
            return describe_head(cast("torch.nn.Module", instance)).weight is None

    return Meta("BaseTunerLayer", (), {"__doc__": original.__doc__})


def _ours_on_adapted_heads(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_fused_lm_head(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        head = model.get_output_embeddings()
        if not hasattr(head, "lora_A"):
            return original(model, temperature, cast_lm_head_to_fp32, outputs)
        if cast_lm_head_to_fp32:
            raise ValueError(
                "cast_lm_head_to_fp32=True replaces the forward of lm_head, which would drop the adapter found on it; "
                "take 'lm_head' out of target_modules, or leave cast_lm_head_to_fp32 off."
            )
        hook_models(model)
        configure(model, Request(temperature=temperature, outputs=wanted(outputs)))
        return None

    return add_fused_lm_head
