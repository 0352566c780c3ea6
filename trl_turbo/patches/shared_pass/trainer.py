"""GRPO and RLOO: the log-probs of a rollout under the policy that sampled it, out of the forward of training steps.

TRL scores a rollout without gradients right after sampling, for its correction of vLLM's log-probs or for the ratio to
the old policy, and again with gradients in the training steps. Until the optimizer steps, both are the same function of
the same numbers. So micro-batches that are trained on before it does are scored as their training steps would, and what
that gave is kept for the loss: a quarter of the training part's products are not made twice.

Of a rollout that is trained on in several micro-batches, the first costs nothing: its graph is what its training step
would make right after. Graphs of further ones are kept where memory is free that the rollout had (`room`), the rest is
scored as TRL does. Which rows a micro-batch will have is read off the random numbers that TRL's shuffle draws next; a
rollout that is then shuffled otherwise is scored anew.
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
from torch.nn.parallel import DistributedDataParallel

from trl_turbo.compat.signatures import misfit
from trl_turbo.patches.shared_pass.room import Room
from trl_turbo.patching import Replacement
from trl_turbo.report import note

SCORE = "_get_per_token_logps_and_entropies"
ROLLOUT = "_generate_and_score_completions"
FIRST = ("self", "model", "input_ids", "attention_mask", "logits_to_keep")


@dataclass
class _MicroBatch:
    """What will be trained on in one step.

    Attributes:
        input_ids: int64 [B, L].
        attention_mask: [B, L].
        keep: How many tokens of a row are scored.
        found: What TRL's method gave, with gradients.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    keep: int
    found: tuple[Any, ...]


@dataclass
class _Rollout:
    """One rollout of a trainer, from its sampling to the last of its training steps that use what was scored.

    Attributes:
        adapters: Which adapters the policy is made of.
        checkpointing: Whether gradient checkpointing is on; TRL turns it off while it scores.
        scored: Whether the policy has been scored.
        kept: Micro-batches that were scored with gradients and not trained on yet.
        versions: Of the trained parameters at that time.
    """

    adapters: tuple[Any, ...]
    checkpointing: bool
    scored: bool = False
    kept: list[_MicroBatch] = field(default_factory=list)
    versions: tuple[int, ...] = field(default=())


_ROLLOUTS: WeakKeyDictionary[Any, _Rollout] = WeakKeyDictionary()
_ROOMS: WeakKeyDictionary[Any, Room] = WeakKeyDictionary()
# Trainers that score apart from now on, and why
_APART: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_SHUFFLED = "random numbers are drawn between scoring and TRL's shuffle, so that micro-batches cannot be foreseen"


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
    wrapped = trainer.model_wrapped
    if (wrapped is not trainer.model or trainer.accelerator.num_processes > 1) and not _is_ddp(trainer):
        return "the model is sharded over processes, or compiled"
    if getattr(args, "use_liger_kernel", False):
        return "use_liger_kernel=True"
    if getattr(trainer, "aux_loss_enabled", False):
        return "the loss has a mixture of experts' auxiliary part"
    if getattr(trainer, "_entropy_bonus_enabled", False):
        return "the loss differentiates the entropy"
    return _APART.get(trainer)


def _is_ddp(trainer: Any) -> bool:
    wrapped = trainer.model_wrapped
    return isinstance(wrapped, DistributedDataParallel) and wrapped.module is trainer.model


def _rolled_out(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, inputs: Any) -> Any:
        _ROLLOUTS.pop(self, None)
        if not self.model.training:
            return original(self, inputs)
        reason = declined(self)
        if reason is None:
            _ROOMS.setdefault(self, Room()).begin(self, self.accelerator.device)
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

        def run() -> Any:
            return original(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

        if torch.is_grad_enabled() and self in _ROOMS:
            _ROOMS[self].watch(input_ids.device)
        rollout = _ROLLOUTS.get(self)
        if rollout is None or args or any(v is not None for k, v in kwargs.items() if k not in _UNDERSTOOD):
            return run()
        key = (input_ids, attention_mask, logits_to_keep)
        if torch.is_grad_enabled():
            return _ready(self, rollout, key, kwargs) or run()
        if rollout.scored or model is not self.model or _adapters(model) != rollout.adapters:
            return run()
        rollout.scored = True
        return _shared(self, rollout, functools.partial(original, self), key, kwargs) or run()

    return method


# Arguments that may be given; all others are inputs of other kinds than text
_UNDERSTOOD = ("batch_size", "compute_entropy", "compute_aux_loss")


def _shared(
    trainer: Any, rollout: _Rollout, score: Callable[..., Any], key: tuple[Any, Any, int], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """What TRL asks for, some of it out of forwards of training steps; `None` where all is scored as TRL does."""
    input_ids, attention_mask, keep = key
    device = input_ids.device
    batches = _upcoming(trainer, len(input_ids))
    if batches is None:
        return None
    batches = [rows.to(device) for rows in batches]

    def in_training(rows: torch.Tensor) -> tuple[Any, ...]:
        these = (input_ids[rows], attention_mask[rows], keep)
        with _as_in_training(trainer, rollout):
            # Through what wraps the model, and all rows at once
            found = score(trainer.model_wrapped, *these, **{**kwargs, "compute_entropy": True, "batch_size": None})
        rollout.kept.append(_MicroBatch(*these, found))
        return found

    room = _ROOMS[trainer]
    room.open(device)
    before = _random_states(device)
    parts = [in_training(batches[0])]
    if _drawn_since(before):
        _APART[trainer] = "the model draws random numbers, as dropout does"
    if trainer in _APART or not parts[0][0].requires_grad:
        _ROLLOUTS.pop(trainer, None)
        _restore(before)
        return None
    wanted = _before_the_optimizer(trainer)
    further = 0 if _is_ddp(trainer) else room.further(trainer, device)
    parts += map(in_training, batches[1:wanted][:further])
    rollout.versions = _versions(trainer.model)
    _tell(trainer, room, len(parts), wanted)
    order = batches[: len(parts)]
    if len(parts) < len(batches):
        # In the order of the rollout, where answers to one prompt follow each other
        rows = torch.cat(batches[len(parts) :]).sort().values
        parts.append(score(trainer.model, input_ids[rows], attention_mask[rows], keep, **kwargs))
        order.append(rows)
    logps = torch.cat([part[0].detach() for part in parts])
    return (logps[torch.cat(order).argsort()], None, *parts[0][2:])


def _upcoming(trainer: Any, rows: int) -> list[torch.Tensor] | None:
    """The rows of each micro-batch, as TRL's shuffle is about to draw them; `None` where they are not of one size."""
    count = trainer.args.steps_per_generation
    if count > 1 and rows != count * trainer.args.per_device_train_batch_size:
        return None
    state = torch.get_rng_state()
    order = torch.randperm(rows)
    torch.set_rng_state(state)
    return list(order.split(rows // count))


def _before_the_optimizer(trainer: Any) -> int:
    """How many micro-batches of a rollout are trained on before the weights change."""
    args = trainer.args
    every = args.gradient_accumulation_steps
    return int(min(args.steps_per_generation, every - trainer._step % every))


def _tell(trainer: Any, room: Room, kept: int, wanted: int) -> None:
    """Say which micro-batches are scored in a pass of their own, and why."""
    name = type(trainer).__name__
    if wanted < trainer.args.steps_per_generation:
        note(
            "shared_pass",
            f"{name}: weights change between the micro-batches of a rollout (steps_per_generation="
            f"{trainer.args.steps_per_generation} > gradient_accumulation_steps="
            f"{trainer.args.gradient_accumulation_steps}): those after it are scored in a pass of their own",
        )
    if kept < wanted and not room.is_measuring:
        why = (
            "DDP takes one" if _is_ddp(trainer) else "more would take more memory than the KV cache leaves to training"
        )
        note(
            "shared_pass",
            f"{name}: not all micro-batches of a rollout wait for backward at once ({why}): "
            "the others are scored in a pass of their own",
        )


def _ready(
    trainer: Any, rollout: _Rollout, key: tuple[Any, Any, int], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """What was scored already, in the order of these rows; `None` where it was something else."""
    if not rollout.kept or not kwargs.get("compute_entropy") or kwargs.get("compute_aux_loss"):
        _ROLLOUTS.pop(trainer, None)
        return None
    batch = rollout.kept.pop(0)
    same_weights = rollout.versions == _versions(trainer.model)
    order = _order(batch, key) if same_weights else None
    if not _on_every_rank(trainer, order is not None):
        _ROLLOUTS.pop(trainer, None)
        if same_weights:
            _APART[trainer] = _SHUFFLED
        return None
    if not rollout.kept:
        _ROLLOUTS.pop(trainer, None)
    return tuple(x[order] if isinstance(x, torch.Tensor) and x.dim() else x for x in batch.found)


def _order(batch: _MicroBatch, key: tuple[Any, Any, int]) -> torch.Tensor | None:
    """Where each of these rows is in a micro-batch; `None` unless all of them are."""
    ids, mask = batch.input_ids, batch.attention_mask
    if batch.keep != key[2] or ids.shape != key[0].shape:
        return None
    same = torch.stack([((ids == row) & (mask == seen)).all(1) for row, seen in zip(key[0], key[1], strict=True)])
    return same.int().argmax(1) if bool(same.any(1).all()) else None


def _on_every_rank(trainer: Any, ready: bool) -> bool:
    """Whether all ranks can go on with what they have: a forward through DDP is one of all ranks or of none."""
    if trainer.accelerator.num_processes == 1:
        return ready
    return bool(trainer.accelerator.gather(torch.tensor([ready], device=trainer.accelerator.device)).all())


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


def _random_states(device: torch.device) -> list[tuple[torch.Generator, torch.Tensor]]:
    """The generators that a model on a device draws from, and how they are now."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    return [(generator, generator.get_state()) for generator in generators]


def _drawn_since(states: list[tuple[torch.Generator, torch.Tensor]]) -> bool:
    return any(not torch.equal(generator.get_state(), state) for generator, state in states)


def _restore(states: list[tuple[torch.Generator, torch.Tensor]]) -> None:
    for generator, state in states:
        generator.set_state(state)
