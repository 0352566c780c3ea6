"""FSDP2 and DeepSpeed ZeRO on the CPU, prepared by accelerate's own code.

accelerate 1.15 gives a process on the CPU the type MULTI_CPU, and looks for FSDP under the types of GPUs alone
(`AcceleratorState.__init__`), so that it wraps the model in DDP however it was launched. It leaves DeepSpeed out where
it is told to use the CPU (`use_cpu`), and finds no backend where it is not (`PartialState._prepare_backend`). Here
those two decisions are made as on GPUs. All that follows from them is theirs: `fully_shard` by `fsdp2_prepare_model`,
the optimizer over DTensors, `deepspeed.initialize`, the collectives, by gloo.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FSDP2 = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
ZERO = {"DS_ACCELERATOR": "cpu"}
ENVIRONMENT = {"fsdp2": FSDP2, "zero2": ZERO, "zero3": ZERO}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of a parameter or gradient; every rank must ask for it."""
    if hasattr(tensor, "full_tensor"):
        return tensor.detach().full_tensor().clone()
    if hasattr(tensor, "ds_status"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach().clone()


def fsdp2_on_cpu() -> None:
    """Let accelerate choose FSDP on the CPU where it was launched with it, as it does on GPUs."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    init = AcceleratorState.__init__

    def choosing(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = plugin
            if self.mixed_precision != "no":
                plugin.set_mixed_precision(self.mixed_precision)

    AcceleratorState.__init__ = choosing


def deepspeed_on_cpu() -> None:
    """Let accelerate find gloo, as it finds NCCL where there are GPUs."""
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


def zero(stage: int) -> dict[str, Any]:
    """Options of a trainer for DeepSpeed ZeRO, which takes the rest from the trainer."""
    auto = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    # Nothing of so small a model would be taken apart
    section = {"stage": stage, "stage3_param_persistence_threshold": 0}
    settings = {**auto, "zero_optimization": section, "zero_allow_untested_optimizer": True}
    return {"use_cpu": False, "deepspeed": settings}


@contextmanager
def not_zero3() -> Iterator[None]:
    """Within this scope transformers loads and saves whole models, though a trainer before used ZeRO-3."""
    from transformers.integrations import deepspeed

    kept, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
