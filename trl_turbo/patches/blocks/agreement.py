"""Whether one of our ops computes what a model's own code does: asked once, on random input, and answered by numbers.

Two questions, and both must be answered yes, for outputs and for gradients of all differentiable inputs:

- *The formula.* Both run in float64 (transformers' norms go through float32 on the way) on the same input. They may
  differ by 64 units in the last place of float32, at the scale of the largest element.
- *The rounding.* Both run in the dtype at hand. Ours may be as far from the original's float64 answer as the original
  itself is: `excess_error`, with a slack of 0.1, and 3 / sqrt(n) on top for the scatter of a sample of n elements.
  Shapes and dtypes must be the original's. An original that is farther than 16 units in the last place (of its
  coarsest input) from its own float64 answer, root mean square, sets no measure and is not adopted.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch

from trl_turbo.kernels.linear_logprob.reference import excess_error

Computation = Callable[..., "torch.Tensor | tuple[torch.Tensor, ...]"]

Form = TypeVar("Form")

OTHERWISE = "computes something else"

_FORMULA_ULPS = 64
_OWN_ULPS = 16
_SLACK = 0.1


def choose(
    original: Computation, candidates: Mapping[Form, Computation], inputs: Sequence[torch.Tensor], differentiable: int
) -> tuple[Form | None, str]:
    """The candidate that agrees with `original`, the closest where several do, or why none does; see `disagreement`."""
    reasons, agreeing = [], {}
    for form, ours in candidates.items():
        reason, apart = disagreement(original, ours, inputs, differentiable)
        if reason is None:
            agreeing[form] = apart
        else:
            reasons.append(reason)
    if agreeing:
        return min(agreeing, key=agreeing.__getitem__), ""
    return None, next((reason for reason in reasons if reason != OTHERWISE), OTHERWISE)


def disagreement(
    original: Computation, ours: Computation, inputs: Sequence[torch.Tensor], differentiable: int
) -> tuple[str | None, float]:
    """Why `ours` must not stand for `original`, or `None`, and how far apart the two are in the dtype at hand.

    Args:
        original: The model's own code, called with `inputs` by position.
        ours: What is to stand for it.
        inputs: In the dtypes at hand.
        differentiable: How many of the inputs, the first ones, have gradients.
    """
    exact_inputs, dtype = [x.double() for x in inputs], inputs[0].dtype
    try:
        truth = _run(original, exact_inputs, differentiable, dtype)
        plain = _run(original, inputs, differentiable, dtype)
    except Exception as error:
        return f"on random input raised {type(error).__name__}: {_first_line(error)}", math.inf
    try:
        exact = _run(ours, exact_inputs, differentiable, dtype)
        found = _run(ours, inputs, differentiable, dtype)
    except Exception as error:
        return f"makes our op raise {type(error).__name__}: {_first_line(error)}", math.inf
    if len(found) != len(plain):
        return "returns another number of tensors", math.inf
    apart = 0.0
    coarsest = max(_eps(x.dtype) for x in inputs)  # what a float32 answer is made of may be rounded to bfloat16
    for mine, theirs, exactly, true in zip(found, plain, exact, truth, strict=True):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return f"gives {list(theirs.shape)} in {_short(theirs.dtype)} where our op gives another", math.inf
        if not (exactly - true).abs().amax() <= _FORMULA_ULPS * _eps(torch.float32) * true.abs().amax():
            return OTHERWISE, math.inf
        size, own = _rms(true), _rms(theirs.double() - true)
        if not own <= _OWN_ULPS * coarsest * size:
            return f"is in {_short(theirs.dtype)} far from its answer in float64", math.inf
        if not excess_error(mine, theirs, true, _SLACK + 3 / math.sqrt(true.numel())) <= 1:
            return f"rounds otherwise in {_short(theirs.dtype)}", math.inf
        apart = max(apart, _rms(mine.double() - theirs.double()) / max(size, torch.finfo(torch.float64).tiny))
    return None, apart


def judge(
    decide: Callable[[], tuple[Form | None, str]], device: torch.device, autocast: torch.dtype | None
) -> tuple[Form | None, str]:
    """Ask for a form in the middle of somebody's forward, out of its sight.

    In a thread of its own: what a forward may run under is the thread's, and must neither see the check's tensors
    (hooks of gradient checkpointing count what is saved for backward) nor change them (inference mode, dispatch modes).
    Only autocast is entered again, since it decides what the original computes. The random numbers of the process are
    not used: `generator` has its own.

    Args:
        decide: Finds a form, or says why there is none.
        device: Where it computes.
        autocast: The dtype of autocast, `None` where it is off.
    """
    done: list[tuple[Form | None, str]] = []

    def work() -> None:
        here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        try:
            with here, torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                done.append(decide())
        except Exception as error:
            done.append((None, f"could not be checked ({type(error).__name__}: {_first_line(error)})"))

    thread = threading.Thread(target=work, name="trl_turbo.check")
    thread.start()
    thread.join()
    return done[0]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device, `None` where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def generator() -> torch.Generator:
    """Random numbers for a check, the same each time; the process's own are not touched."""
    return torch.Generator().manual_seed(20)


def _run(
    computation: Computation, inputs: Sequence[torch.Tensor], differentiable: int, grad_dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Outputs, then the gradients of the first inputs for gradients of the outputs that `grad_dtype` can hold."""
    inputs = [x.detach().clone().requires_grad_(i < differentiable) for i, x in enumerate(inputs)]
    outputs = computation(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    numbers = generator()
    grads = [torch.randn(y.shape, generator=numbers).to(grad_dtype).to(y.device, y.dtype) for y in outputs]
    return (*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs[:differentiable], grads))


def _rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
