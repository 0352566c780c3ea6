"""OnlineDPO, which builds and syncs a vLLM of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from trl_turbo.compat.signatures import misfit
from trl_turbo.engine.serving import Trainee, serving
from trl_turbo.engine.sizing import Work
from trl_turbo.patches.rollout import server
from trl_turbo.patches.rollout.generation import llm_moved, turbo_llm
from trl_turbo.patches.rollout.release import refresh, released_after
from trl_turbo.patching import Replacement

METHODS = {
    "_move_model_to_vllm": ("self",),
    "_generate_vllm_colocate": ("self", "prompts"),
}


def probe(module: ModuleType) -> str | None:
    """Why the module does not fit, or `None`."""
    reason = llm_moved(module)
    if reason is not None:
        return reason
    owner = getattr(module, "OnlineDPOTrainer", None)
    if owner is None:
        return f"{module.__name__} has no OnlineDPOTrainer"
    return misfit(owner, METHODS)


def build(module: ModuleType) -> Iterator[Replacement]:
    """The replacements."""
    owner = module.OnlineDPOTrainer
    yield Replacement(module, "LLM", turbo_llm)
    yield Replacement(owner, "__init__", _init)
    yield Replacement(owner, "_move_model_to_vllm", _move_model_to_vllm)
    yield Replacement(owner, "_generate_vllm_colocate", released_after)


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Its own __init__ makes the model and the engine, in this order
        with serving(lambda: Trainee(self.model, self.accelerator, _work(self.args))):
            result = original(self, *args, **kwargs)
        if self.args.use_vllm and self.args.vllm_mode == "server":
            server.told(self.model)
        return result

    return method


def _work(args: Any) -> Work:
    completion = args.max_new_tokens
    # Two answers a prompt; `max_length` bounds prompt and completion together
    return Work(2 * args.per_device_train_batch_size, completion, max(1, args.max_length - completion))


def _move_model_to_vllm(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any) -> Any:
        return None if refresh(self) else original(self)

    return method
