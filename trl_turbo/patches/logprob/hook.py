"""Find the causal language models inside what a trainer holds, and give their classes the scoring forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from trl_turbo.compat.sharded import own_class
from trl_turbo.patches.logprob.forward import make_forward
from trl_turbo.patching import Replacement, extend

PATCH = "logprob.models"


def hook_models(*models: Any) -> None:
    """Let every causal language model inside `models` score tokens; wrappers are seen through, `None` is fine."""
    for model in models:
        if model is not None:
            for causal_lm in causal_lms(model):
                _hook(causal_lm)


def causal_lms(model: Any) -> Iterator[Any]:
    """The models with an output head inside `model`: itself, the base of a PEFT model, PPO's policy."""
    for wrapper in ("module", "_orig_mod", "policy"):  # DDP and DeepSpeed, torch.compile, PPO's PolicyAndValueWrapper
        inner = getattr(model, "_modules", {}).get(wrapper)
        if inner is not None:
            yield from causal_lms(inner)
            return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "get_output_embeddings") and hasattr(base, "config"):
        yield base


def _hook(model: Any) -> None:
    owner: Any = own_class(model)
    extend(PATCH, Replacement(owner, "forward", make_forward))
    own = vars(model).get("forward")
    if own is not None and not _leads_to(own, owner.forward):
        # Prepared for mixed precision before the hook came, or patched by Liger: stand in front of it
        extend(PATCH, Replacement(model, "forward", functools.partial(_in_front, model)))


def _in_front(model: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    inner = make_forward(lambda _, *args, **kwargs: original(*args, **kwargs))

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(model, *args, **kwargs)

    forward.__dict__["scores"] = True
    return forward


def _leads_to(function: Any, hook: Any) -> bool:
    """Whether an instance's forward calls `hook`, the class's, as far as its chain of wrappers tells."""
    for _ in range(16):  # a chain is a few wrappers long
        if function is hook or vars(function).get("scores", False):
            return True
        if takes_fused_lm_head(function):
            return True  # TRL's own fused head (1.15 and later): its trainers ask that one, not the hook
        inner = getattr(function, "__func__", None) or getattr(function, "__wrapped__", None)
        if inner is None:
            return False
        function = inner
    return False


def takes_fused_lm_head(function: Any) -> bool:
    """Whether a function is the forward that TRL's `add_fused_lm_head` (1.15 and later) sets on a model."""
    # Read off the code: TRL's forward carries the name and signature of the model's
    code = getattr(function, "__code__", None)
    return code is not None and "fused_lm_head" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
