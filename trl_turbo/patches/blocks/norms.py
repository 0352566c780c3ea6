"""RMSNorms of any model: those that round before they scale (Llama) and those that scale first (Gemma, OLMo 2)."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from trl_turbo.compat.sharded import whole_shape
from trl_turbo.kernels.rms_norm import rms_norm
from trl_turbo.patches.blocks.agreement import choose, generator
from trl_turbo.patches.blocks.classes import (
    Forward,
    State,
    Verdicts,
    adopt_classes,
    only_argument,
    runs_plainly,
    stand_in,
)

# What a check has at least: 256 rows by 64 features scatter by 5%
_ELEMENTS = 16384


class NormForm(NamedTuple):
    """Which of the forms of `rms_norm` a module computes."""

    offset: float
    scale_in_float32: bool


FORMS = (NormForm(0.0, False), NormForm(1.0, True), NormForm(0.0, True), NormForm(1.0, False))


def adopt(model: nn.Module) -> None:
    """Let the classes of `model`'s norms run our op where they compute what it does."""
    adopt_classes(_norms(model), NormVerdicts, make_forward, lambda module: module.weight)


class NormVerdicts(Verdicts[NormForm]):
    """Which form of `rms_norm` the norms of one class are."""

    feature = "norms"

    def mark(self, module: Any) -> Hashable:
        """The weight's dtype, and eps."""
        return _weight(module).dtype, _eps(module)

    def traits(self, module: Any) -> Hashable:
        """The width, too."""
        return self.mark(module), whole_shape(module.weight)

    def decide(self, module: Any, state: State) -> tuple[NormForm | None, str]:
        """The form that agrees with the original."""
        numbers, width, eps = generator(), whole_shape(module.weight)[0], _eps(module)
        rows = 2 * max(32, math.ceil(_ELEMENTS / 2 / width))
        x = torch.randn(2, rows // 2, width, generator=numbers)
        x[:, ::2] *= math.sqrt(eps)  # rows so small that it matters where eps is added
        weight = torch.randn(width, generator=numbers)
        inputs = [x.to(state.device, state.dtype), weight.to(state.device, module.weight.dtype)]

        def original(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return self.original(stand_in(module, weight=weight), x)

        candidates = {form: functools.partial(rms_norm, eps=eps, **form._asdict()) for form in FORMS}
        return choose(original, candidates, inputs, differentiable=2)


def make_forward(original: Forward) -> Forward:
    """Wrap a norm's forward so that it runs `rms_norm` in the form that was found to be its own."""
    verdicts = NormVerdicts(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x: Any = only_argument(args, kwargs)
        weight = _weight(self)
        if not (runs_plainly(x) and runs_plainly(weight)) or x.device != weight.device or weight.shape != x.shape[-1:]:
            return original(self, *args, **kwargs)
        form = verdicts.form(self, State.of(self, x))
        if form is None:
            return original(self, *args, **kwargs)
        return rms_norm(x, weight, _eps(self), offset=form.offset, scale_in_float32=form.scale_in_float32)

    forward.__dict__["verdicts"] = verdicts
    return forward


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with one weight [D], an eps and nothing else."""
    for module in model.modules():
        weights = [p for p in module._parameters.values() if p is not None]
        alone = len(weights) == 1 and not module._modules and not module._buffers and isinstance(_eps(module), float)
        if alone and module._parameters.get("weight") is weights[0] and len(whole_shape(weights[0])) == 1:
            yield module


def _weight(module: Any) -> Any:
    # nn.Module's own look-up takes longer than all else that a call is asked
    found = module._parameters.get("weight")
    return getattr(module, "weight", None) if found is None else found  # a plain attribute under FSDP and DataParallel


def _eps(module: Any) -> Any:
    own = vars(module)
    return own.get("variance_epsilon", own.get("eps"))
