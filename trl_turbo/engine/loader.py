"""The model loaders that vLLM calls: one takes the trainer's tensors, the other loads and gives the trainer vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.engine.sharing import SharedWeights
from trl_turbo.engine.storage import without_storage

#: `load_format` of a shared engine.
LOAD_FORMAT = "trl_turbo_shared"
#: `load_format` of one whose model has no values yet.
CHECKPOINT_FORMAT = "trl_turbo_checkpoint"

_current: list[SharedWeights] = []


@contextmanager
def sharing(weights: SharedWeights) -> Iterator[None]:
    """While open, an engine with :data:`LOAD_FORMAT` that starts takes these weights.

    vLLM builds its loader from the load format alone, so what to load cannot be passed along.
    """
    _current.append(weights)
    try:
        yield
    finally:
        _current.pop()


@register_model_loader(LOAD_FORMAT)
class SharedLoader(BaseModelLoader):
    """Builds vLLM's model without storage and points it at the weights of :func:`sharing`."""

    def download_model(self, model_config: Any) -> None:
        """There is nothing to download."""

    def load_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Build the model, share the weights, and let vLLM finish as after any load.

        Raises:
            EngineDeclinedError: The weights cannot be shared.
        """
        if not _current:
            raise EngineDeclinedError(f"load_format={LOAD_FORMAT!r} is for engines that a trainer starts")
        weights = _current[-1]
        with ExitStack() as construction, plain_cpu_linears():
            construction.enter_context(without_storage())
            self._construction = construction
            model: nn.Module = super().load_model(*args, **kwargs)
        weights.verify(model)
        return model

    def load_weights(self, model: nn.Module, model_config: Any) -> None:  # noqa: ARG002
        """Share instead of load; called by vLLM between construction and post-processing."""
        self._construction.close()
        _current[-1].attach(model)


@register_model_loader(CHECKPOINT_FORMAT)
class CheckpointLoader(BaseModelLoader):
    """Lets vLLM's own loader read the checkpoint and points the model of :func:`sharing` at the result.

    Here, not after vLLM has started: once it has put its adapter layers around its modules, their parameters have other
    names than `load_weights` looks for.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._reader = get_model_loader(replace(load_config, load_format="auto"))

    def download_model(self, model_config: Any) -> None:
        """As vLLM's."""
        self._reader.download_model(model_config)

    def load_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As vLLM's, save that the weights stay as they are in the checkpoint.

        Raises:
            EngineDeclinedError: The weights cannot be shared.
        """
        if not _current:
            raise EngineDeclinedError(f"load_format={CHECKPOINT_FORMAT!r} is for trl_turbo.from_pretrained")
        with plain_cpu_linears():
            model: nn.Module = super().load_model(*args, **kwargs)
        _current[-1].verify(model)
        return model

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Read the checkpoint and share; called by vLLM between construction and post-processing."""
        _current[-1].fill(model, lambda: self._reader.load_weights(model, model_config))


@contextmanager
def plain_cpu_linears() -> Iterator[None]:
    """On the CPU vLLM repacks every linear and frees the original: keep `torch.nn.functional.linear` on the shared one.

    Answers `vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm`; can go when vLLM has a switch for it.
    """
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    original = utils.dispatch_cpu_unquantized_gemm

    def keep(layer: nn.Module, remove_weight: bool) -> None:  # noqa: ARG001
        layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

    utils.dispatch_cpu_unquantized_gemm = keep
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = original
