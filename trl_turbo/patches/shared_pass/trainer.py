"""GRPO and RLOO: the log-probs of a rollout under the policy that sampled it, out of the forward of the training step.

TRL scores a rollout without gradients right after sampling, for its correction of vLLM's log-probs or for the ratio to
the old policy, and again with gradients in the training step. Where one step trains on all of the rollout, with the
weights that it was scored under, both are the same function of the same numbers. So the first is run as the second
would be, and what it gave is kept for the loss: a quarter of the training part's products are not made twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from trl_turbo.compat.signatures import misfit
from trl_turbo.patching import Replacement
from trl_turbo.report import note

SCORE = "_get_per_token_logps_and_entropies"
ROLLOUT = "_generate_and_score_completions"
FIRST = ("self", "model", "input_ids", "attention_mask", "logits_to_keep")


@dataclass
class _Rollout:
    """One rollout of a trainer, from its sampling to its training step.

    Attributes:
        adapters: Which adapters the policy is made of.
        checkpointing: Whether gradient checkpointing is on; TRL turns it off while it scores.
        scored: Whether the policy has been scored.
        key: What was scored: input_ids [B, L], attention_mask [B, L] and how many tokens are kept.
        found: What TRL's method gave, with gradients.
        versions: Of the trained parameters at that time.
    """

    adapters: tuple[Any, ...]
    checkpointing: bool
    scored: bool = False
    key: tuple[torch.Tensor, torch.Tensor, int] | None = None
    found: tuple[Any, ...] = ()
    versions: tuple[int, ...] = field(default=())


_ROLLOUTS: WeakKeyDictionary[Any, _Rollout] = WeakKeyDictionary()
# Trainers whose model draws random numbers in its forward
_RANDOM: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def probe(module: ModuleType, trainer_name: str) -> str | None:
    """Why the module does not fit, or `None`."""
    trainer = getattr(module, trainer_name, None)
    if trainer is None:
        return f"{module.__name__} has no {trainer_name}"
    return misfit(trainer, {SCORE: FIRST, ROLLOUT: ("self", "inputs")})


def build(module: ModuleType, trainer_name: str) -> Iterator[Replacement]:
    """The method of a whole rollout, and the one that scores."""
    trainer = getattr(module, trainer_name)
    yield Replacement(trainer, ROLLOUT, _rolled_out)
    yield Replacement(trainer, SCORE, _scored)


def declined(trainer: Any) -> str | None:
    """Why a trainer scores a rollout apart from its training step, in words, or `None`."""
    args = trainer.args
    if args.steps_per_generation != 1 or trainer.num_iterations != 1:
        return (
            f"a rollout is trained on in {args.steps_per_generation * trainer.num_iterations} passes "
            "(steps_per_generation x num_iterations)"
        )
    if trainer.accelerator.num_processes > 1 or trainer.model_wrapped is not trainer.model:
        return "the model is wrapped for more than one process, or compiled"
    if getattr(args, "use_liger_kernel", False):
        return "use_liger_kernel=True"
    if getattr(trainer, "aux_loss_enabled", False):
        return "the loss has a mixture of experts' auxiliary part"
    if getattr(trainer, "_entropy_bonus_enabled", False):
        return "the loss differentiates the entropy"
    return "the model draws random numbers, as dropout does" if trainer in _RANDOM else None


def _rolled_out(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, inputs: Any) -> Any:
        _ROLLOUTS.pop(self, None)
        if not self.model.training:
            return original(self, inputs)
        reason = declined(self)
        if reason is None:
            _ROLLOUTS[self] = _Rollout(_adapters(self.model), bool(self.model.is_gradient_checkpointing))
        try:
            answer = original(self, inputs)
        except BaseException:
            _ROLLOUTS.pop(self, None)
            raise
        if (
            reason is not None
            and isinstance(answer, dict)
            and ("old_per_token_logps" in answer or "old_logps" in answer)
        ):
            note("shared_pass", f"{type(self).__name__}: {reason}, so the rollout is scored in a pass of its own")
        return answer

    return method


def _scored(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(
        self: Any, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if args:  # RLOO names all but this one
            kwargs, args = {"batch_size": args[0], **kwargs}, args[1:]

        def run(**more: Any) -> Any:
            return original(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs | more)

        rollout = _ROLLOUTS.get(self)
        if rollout is None or args or any(v is not None for k, v in kwargs.items() if k not in _UNDERSTOOD):
            return run()
        key = (input_ids, attention_mask, logits_to_keep)
        if torch.is_grad_enabled():
            return _ready(self, rollout, key, kwargs) or run()
        if rollout.scored or model is not self.model or _adapters(model) != rollout.adapters:
            return run()
        rollout.scored = True
        before = _drawn(input_ids.device)
        with _as_in_training(self, rollout):
            # All rows at once, as the training step has them
            found = run(compute_entropy=True, batch_size=None)
        if _drawn(input_ids.device) != before:
            _RANDOM[self] = True
            _ROLLOUTS.pop(self, None)
        elif found[0].requires_grad:
            rollout.key, rollout.found, rollout.versions = key, found, _versions(self.model)
        return (found[0].detach(), None, *found[2:])

    return method


# Arguments that may be given; all others are inputs of other kinds than text
_UNDERSTOOD = ("batch_size", "compute_entropy", "compute_aux_loss")


def _ready(
    trainer: Any, rollout: _Rollout, key: tuple[Any, Any, int], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """What was scored already, in the order of these rows; `None` where it was something else."""
    _ROLLOUTS.pop(trainer, None)
    if rollout.key is None or not kwargs.get("compute_entropy") or kwargs.get("compute_aux_loss"):
        return None
    ids, mask, keep = rollout.key
    if keep != key[2] or ids.shape != key[0].shape or rollout.versions != _versions(trainer.model):
        return None
    # TRL shuffles the rows in between
    same = torch.stack([((ids == row) & (mask == seen)).all(1) for row, seen in zip(key[0], key[1], strict=True)])
    if not bool(same.any(1).all()):
        return None
    order = same.int().argmax(1)
    return tuple(x[order] if isinstance(x, torch.Tensor) and x.dim() else x for x in rollout.found)


@contextmanager
def _as_in_training(trainer: Any, rollout: _Rollout) -> Iterator[None]:
    """With gradients, autocast and gradient checkpointing as the training step has them."""
    model = trainer.model
    turn_on = rollout.checkpointing and not model.is_gradient_checkpointing
    if turn_on:
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    try:
        with torch.enable_grad(), trainer.compute_loss_context_manager():
            yield
    finally:
        if turn_on:
            model.gradient_checkpointing_disable()


def _adapters(model: Any) -> tuple[Any, ...]:
    """Which adapters are active, and whether they are turned off, as the first layer that has any says."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            return (*module.active_adapters, bool(module.disable_adapters))
    return ()


def _versions(model: Any) -> tuple[int, ...]:
    return tuple(parameter._version for parameter in model.parameters())


def _drawn(device: torch.device) -> Any:
    """Differs once random numbers were drawn, on the CPU or on a device."""
    on_device: Any = None
    if device.type == "cuda":
        on_device = torch.cuda.default_generators[device.index or 0].get_offset()
    return torch.default_generator.get_state().numpy().tobytes(), on_device
