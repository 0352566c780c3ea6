"""`VLLMGeneration`, through which GRPO and RLOO sample: our engine for `LLM`, and a sync that copies nothing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.compat.signatures import misfit
from trl_turbo.engine.serving import Trainee, serving
from trl_turbo.engine.sizing import Work
from trl_turbo.patches.rollout import server
from trl_turbo.patches.rollout.release import ids_only, refresh
from trl_turbo.patching import Replacement

METHODS = {
    "_init_vllm": ("self",),
    "sync_weights": ("self",),
    "generate": ("self", "prompts", "images", "num_generations"),
}
#: What `_init_vllm` finds on the object.
ATTRIBUTES = ("mode", "max_num_seqs", "max_model_length", "max_completion_length")


def probe(module: ModuleType) -> str | None:
    """Why the module does not fit, or `None`."""
    reason = llm_moved(module)
    if reason is not None:
        return reason
    owner = getattr(module, "VLLMGeneration", None)
    if owner is None:
        return f"{module.__name__} has no VLLMGeneration"
    reason = misfit(owner, METHODS)
    if reason is not None:
        return reason
    missing = [name for name in ATTRIBUTES if name not in inspect.signature(owner.__init__).parameters]
    return f"VLLMGeneration takes no {missing[0]}" if missing else None


def llm_moved(module: ModuleType) -> str | None:
    """Why the module's `LLM` cannot be replaced, or `None`."""
    from trl_turbo.engine.llm import replaceable

    return replaceable(module)


def turbo_llm(_original: Any) -> Any:
    """What stands in the place of `LLM`."""
    from trl_turbo.engine.llm import TurboLLM

    return TurboLLM


def build(module: ModuleType) -> Iterator[Replacement]:
    """The replacements."""
    owner = module.VLLMGeneration
    yield Replacement(module, "LLM", turbo_llm)
    yield Replacement(owner, "_init_vllm", _init_vllm)
    yield Replacement(owner, "sync_weights", _sync_weights)
    yield Replacement(owner, "generate", _generate)


def _init_vllm(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any) -> Any:
        if self.mode != "colocate":
            server.told(self.model)
            return original(self)
        with serving(lambda: Trainee(self.model, self.accelerator, _work(self))):
            return original(self)

    return method


def _work(generation: Any) -> Work:
    completion = generation.max_completion_length
    longest = generation.max_model_length
    return Work(
        sequences=generation.max_num_seqs or 1,
        completion_tokens=completion,
        prompt_tokens=max(1, longest - completion) if longest else None,
    )


def _sync_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any) -> Any:
        if not refresh(self):
            return original(self)
        # TRL 1.10 and later ask here before each rollout whether sleep mode threw the weights away
        self._llm_weights_sleeping = False
        return None

    return method


def _generate(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ids_only(self):  # it reads token ids and log-probs
            return original(self, *args, **kwargs)

    return method
