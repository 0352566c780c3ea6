"""GRPO and RLOO with `use_vllm=False`: after the trainer is built, sampling moves to a shared engine where that can be.

After, not before: only then is there a model to tell whether it can be shared, and where it cannot, the trainer is
already one that samples with transformers.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.engine.serving import alone
from trl_turbo.engine.together import agreed
from trl_turbo.patches.rollout.sampler import asked_of_transformers, foreign, nameless, told, unknown_to
from trl_turbo.patching import Replacement, as_written

#: What a trainer must have for a switch after it was built.
ATTRIBUTES = ("use_vllm", "vllm_mode", "_last_loaded_step")

#: What the report says of a trainer that was routed.
ROUTED = (
    "samples from a vLLM that shares its weights, though the script says use_vllm=False; patch(rollout='script') "
    "leaves the choice to the script"
)


def probe(module: ModuleType, trainer_name: str) -> str | None:
    """Why the module does not fit, or `None`."""
    trainer = getattr(module, trainer_name, None)
    if trainer is None or not hasattr(module, "VLLMGeneration"):
        return f"{module.__name__} has no {trainer_name} that samples through VLLMGeneration"
    names = set(as_written(trainer.__init__).__code__.co_names)
    missing = [name for name in ATTRIBUTES if name not in names]
    if missing:
        return f"{trainer_name}.__init__ no longer sets {missing[0]}"
    return unknown_to(_SOURCES, module.VLLMGeneration)


def build(module: ModuleType, trainer_name: str) -> Iterator[Replacement]:
    """The replacements."""
    trainer = getattr(module, trainer_name)
    yield Replacement(trainer, "__init__", functools.partial(_init, module, trainer))


def _init(module: ModuleType, owner: type, original: Callable[..., Any]) -> Callable[..., Any]:
    turn = owner._generate_single_turn  # type: ignore[attr-defined]

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if not self.use_vllm:
            engine = sys.modules[module.VLLMGeneration.__module__]
            told(self, agreed(foreign(engine) or _kept(self, turn)) or _moved(self, module), ROUTED)
        return result

    return method


def _kept(trainer: Any, turn: Any) -> str | None:
    """Say why the script's way to sample must stay, or return `None`."""
    if getattr(trainer, "rollout_func", None) is not None:
        return "rollout_func samples as it pleases"
    if type(trainer)._generate_single_turn is not turn:
        return "it overrides _generate_single_turn"
    if getattr(trainer, "loss_type", "") == "vespo":
        return "loss_type='vespo' takes other corrections for vLLM's samples than the default"
    return asked_of_transformers(trainer.args) or nameless(trainer.model)


def _moved(trainer: Any, module: ModuleType) -> str | None:
    """Build the engine and let the trainer use it; where that is declined, say why and leave the trainer alone."""
    from trl_turbo.engine.errors import EngineDeclinedError

    try:
        with alone():
            generation = module.VLLMGeneration(**_arguments(trainer, module.VLLMGeneration))
    except EngineDeclinedError as error:
        return str(error)
    trainer.vllm_generation = generation
    trainer.vllm_mode = "colocate"
    trainer._last_loaded_step = -1
    trainer.use_vllm = True
    return None


def _eos(trainer: Any) -> dict[str, Any]:
    """What the script gives `generate`, and the end-of-text tokens at which transformers would have stopped."""
    ends = trainer.generation_config.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends] * (ends is not None)
    return {"stop_token_ids": ends, **(trainer.args.generation_kwargs or {})}


_SOURCES: dict[str, Callable[[Any], Any]] = {
    "model": lambda t: t.model,
    "accelerator": lambda t: t.accelerator,
    "is_fsdp_enabled": lambda t: t.is_fsdp_enabled,
    "processing_class": lambda t: t.processing_class,
    "mode": lambda _: "colocate",
    "structured_outputs_regex": lambda t: t.args.vllm_structured_outputs_regex,
    "gpu_memory_utilization": lambda t: t.args.vllm_gpu_memory_utilization,
    "max_model_length": lambda t: t.args.vllm_max_model_length,
    "max_num_seqs": lambda t: t.args.per_device_train_batch_size * t.args.steps_per_generation,
    "model_impl": lambda t: t.args.vllm_model_impl,
    "trust_remote_code": lambda t: t.args.trust_remote_code,
    "repetition_penalty": lambda t: t.repetition_penalty,
    "temperature": lambda t: t.temperature,
    "top_p": lambda t: t.top_p,
    "top_k": lambda t: t.top_k,
    "min_p": lambda t: t.min_p,
    "max_completion_length": lambda t: t.max_completion_length,
    # GRPO's importance-sampling correction reads them; RLOO has none
    "logprobs": lambda t: 0 if hasattr(t, "vllm_importance_sampling_correction") else None,
    "generation_kwargs": _eos,
}


def _arguments(trainer: Any, generation: Any) -> dict[str, Any]:
    known = inspect.signature(generation.__init__).parameters
    return {name: source(trainer) for name, source in _SOURCES.items() if name in known}
