"""The forward of a causal language model, able to score tokens without making logits.

The model's own forward runs, whatever it does; only its output head is stood in for. What the model then does to the
"logits" (scale, softcap) is recorded and handed to the kernel, so no table of models is needed.

The hook sits on the class: `accelerator.unwrap_model(keep_fp32_wrapper=False)` drops a forward that was set on an
instance, and `copy.deepcopy` makes a copy call the original's. An instance's forward is wrapped only where something
else (mixed precision prepared before the hook, Liger's instance patch) already stands in front of the class's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trl_turbo.compat.heads import Head
from trl_turbo.kernels.linear_logprob import head_logprob, linear_logprob
from trl_turbo.patches.logprob.output import FusedCausalLMOutput
from trl_turbo.patches.logprob.pending import PendingLogits, UnsupportedLogitsOp
from trl_turbo.patches.logprob.request import IGNORED, Request, active_request, entropy_has_gradient, next_token
from trl_turbo.patches.logprob.whole import instead_of, on_instance, where_whole
from trl_turbo.report import note

if TYPE_CHECKING:
    from trl_turbo.patches.attention.passes import Arranged

# Models for which `fused_lm_head=True` means a certain request (TRL >= 1.15 with an adapter on the head)
_CONFIGURED: WeakKeyDictionary[nn.Module, Request] = WeakKeyDictionary()
# Models that turned out not to be understood: scored by TRL's own path, with a note
_DECLINED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def configure(model: nn.Module, request: Request) -> None:
    """Make `model(..., labels=..., fused_lm_head=True)` answer `request`; its `targets` come from the labels."""
    _CONFIGURED[model] = request


def _configured(model: nn.Module) -> Request | None:
    request = _CONFIGURED.get(model)
    return None if request is None else replace(request, entropy_grad=entropy_has_gradient())


def arrange(
    model: nn.Module,  # noqa: ARG001
    original: Callable[..., Any],  # noqa: ARG001
    args: tuple[Any, ...],  # noqa: ARG001
    kwargs: dict[str, Any],  # noqa: ARG001
    targets: torch.Tensor,  # noqa: ARG001
) -> Arranged | None:
    """How a pass runs on other rows than the padded ones: not at all, until packing or attention takes this place."""
    return None


def make_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a causal language model's forward so that it can answer a `Request`."""

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.pop("fused_lm_head", None)
        request = _configured(self) if asked is True else asked or active_request()
        if request is None or self in _DECLINED:
            if asked:
                raise ValueError(
                    f"{type(self).__name__} was called with fused_lm_head=True but was never given a fused head; "
                    "call it inside a TRL trainer that trl_turbo patched."
                )
            return original(self, *args, **kwargs)
        labels = kwargs.pop("labels", None)
        shift_labels = kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        try:
            return _score(self, original, request, args, kwargs, labels, shift_labels, items)
        except UnsupportedLogitsOp as error:
            if asked:
                raise
            _DECLINED[self] = str(error)
            note("logprob", f"{type(self).__name__}: {error}; TRL's own path is used, with full logits")
            return original(self, *args, **kwargs)

    return forward


def _score(
    model: Any,
    original: Callable[..., Any],
    request: Request,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    num_items: Any,
) -> FusedCausalLMOutput:
    module = model.get_output_embeddings()
    if module is None:
        raise UnsupportedLogitsOp("the model has no output head (get_output_embeddings() is None)")
    kwargs = {k: v for k, v in kwargs.items() if k not in ("logits_to_keep", "num_logits_to_keep", "return_dict")}
    kwargs["use_cache"] = False
    kwargs.pop("output_hidden_states", None)  # a scoring pass reads none, and they would be kept until backward

    from_labels = labels is not None or shift_labels is not None
    targets = _targets(request, args, kwargs, labels, shift_labels)
    arranged = None if shift_labels is not None else arrange(model, original, args, kwargs, targets)
    if arranged is not None:
        args, kwargs = (), arranged.kwargs
    asked = targets if arranged is None else arranged.targets
    with standing_in_for(module, model.config, instead_of=instead_of(module)) as seen:
        outputs = original(model, *args, return_dict=True, **kwargs)
    if arranged is not None:
        arranged.ran()
    pending = getattr(outputs, "logits", None)
    if not isinstance(pending, PendingLogits) or seen.calls != 1:
        raise UnsupportedLogitsOp(
            f"the model's forward called its output head {seen.calls} times or changed the result"
        )

    hidden = pending.hidden  # [B, L, H]
    if asked.size(1) < hidden.size(1):  # prompt-learning adapters put virtual tokens in front
        asked = nn.functional.pad(asked, (hidden.size(1) - asked.size(1), 0), value=IGNORED)

    with seen.autocast():
        stats = where_whole(
            module,
            hidden,
            lambda head, rows: _statistics(head, module, pending.of(rows), asked.to(hidden.device), request),
        )
    if arranged is not None and arranged.rows is not None:
        targets = targets.to(hidden.device)
        stats = {name: arranged.rows.spread(value) for name, value in stats.items()}
        stats |= {"targets": targets, "label_mask": targets != IGNORED}
    request.answered.append(type(model).__name__)
    if from_labels and shift_labels is None:
        stats = {name: value[:, :-1] for name, value in stats.items()}
        stats["loss"] = _mean_loss(stats, num_items)
    if "logsumexp2" in stats and "logsumexp" in stats:
        stats["log_sum_sq_probs"] = stats["logsumexp2"] - 2 * stats["logsumexp"]
    return FusedCausalLMOutput(
        aux_loss=getattr(outputs, "aux_loss", None), vocab=torch.tensor([pending.vocab]), **stats
    )


def _targets(
    request: Request,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
) -> torch.Tensor:
    """The token that each position [B, L] is asked about."""
    if shift_labels is not None:
        return shift_labels
    if labels is not None:
        return next_token(labels)
    input_ids = kwargs.get("input_ids", args[0] if args else None)
    if input_ids is None or request.targets is None:
        raise UnsupportedLogitsOp("the model was called without input_ids, as prompt-learning adapters do")
    return request.targets(input_ids, kwargs.get("attention_mask"))


def _statistics(
    head: Head, module: nn.Module, pending: PendingLogits, targets: torch.Tensor, request: Request
) -> dict[str, torch.Tensor]:
    mask = targets != IGNORED  # [B, L]
    rows, wanted = pending.hidden[mask], targets[mask]  # [N, H], [N]
    common: dict[str, Any] = {
        "temperature": request.temperature,
        "softcap": pending.softcap,
        "logit_scale": pending.logit_scale,
        "outputs": request.outputs,
        "entropy_grad": request.entropy_grad,
    }
    in_fp32 = head.in_fp32 or request.in_fp32
    with torch.autocast(rows.device.type, enabled=False) if in_fp32 else nullcontext():
        if head.weight is None:
            note("logprob", f"{head.reason}: scored through the head itself, a few rows at a time")
            # Its hooks ran already: those before it on `rows`, those after it on the pending logits
            hooked = module._forward_hooks or module._forward_pre_hooks
            found = head_logprob(head.module if hooked else module, rows, wanted, **common)
        else:
            rows = rows.float() if in_fp32 else rows
            low_rank = None
            if head.adapter is not None and head.adapter_weight is not None:
                low_rank = head.adapter(rows), head.adapter_weight
            found = linear_logprob(rows, head.weight, wanted, bias=head.bias, low_rank=low_rank, **common)
    stats = {"targets": targets, "label_mask": mask}
    names = {"logps": "log_probs", "mean_logit": "mean_logits", "top1": "is_top1"}
    for name, value in found._asdict().items():
        if value is not None:
            # masked_scatter keeps the graph even when no position is asked about
            stats[names.get(name, name)] = value.new_zeros(mask.shape).masked_scatter(mask, value)
    return stats


def _mean_loss(stats: dict[str, torch.Tensor], num_items: Any) -> torch.Tensor:
    count = stats["label_mask"].sum().clamp(min=1) if num_items is None else num_items
    return -stats["log_probs"].sum() / count


class _Seen:
    """What an intercepted head was called with."""

    def __init__(self) -> None:
        self.calls = 0
        self.dtype: torch.dtype | None = None
        self.device = "cpu"

    def autocast(self) -> Any:
        """The autocast state the head ran under: an instance-level forward may have left it by now."""
        if self.dtype is None:
            return torch.autocast(self.device, enabled=False)
        return torch.autocast(self.device, dtype=self.dtype)


@contextmanager
def standing_in_for(module: nn.Module, config: Any, *, instead_of: str = "forward") -> Iterator[_Seen]:
    """Within this scope an output head returns `PendingLogits` of the hidden states that it is called with.

    Args:
        module: The head.
        config: The model's.
        instead_of: The method that does not run: `forward`, or `_call_impl` for its hooks not to run either.
    """
    seen = _Seen()
    vocab = getattr(module, "out_features", None) or config.get_text_config().vocab_size

    def forward(hidden: torch.Tensor, *_: Any, **__: Any) -> PendingLogits:
        seen.calls += 1
        seen.device = hidden.device.type
        if torch.is_autocast_enabled(seen.device):
            seen.dtype = torch.get_autocast_dtype(seen.device)
        return PendingLogits(hidden, vocab)

    with on_instance(module, instead_of, forward):
        yield seen
