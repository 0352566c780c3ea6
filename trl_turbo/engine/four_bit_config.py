"""vLLM's bitsandbytes layers for exactly the linears that the trainer has in 4 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config

from trl_turbo.engine.errors import EngineDeclinedError

try:  # in vLLM's tree up to 0.27
    from vllm.model_executor.layers.quantization.bitsandbytes import BitsAndBytesConfig, BitsAndBytesLinearMethod
except ImportError:
    try:
        from vllm_bnb_plugin.bitsandbytes import BitsAndBytesConfig, BitsAndBytesLinearMethod
    except ImportError as error:
        raise EngineDeclinedError(
            "the model is in 4 bits, and this vLLM reads such weights through vllm-bnb-plugin, which is not installed; "
            "run pip install vllm-bnb-plugin"
        ) from error

#: What `quantization` takes. Not "bitsandbytes": for that name vLLM, or its plugin, takes its own loader, not ours.
NAME = "trl_turbo_bitsandbytes"


def llm_kwargs(names: Iterable[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """What `LLM` needs to build these linears in 4 bits.

    Args:
        names: The linears, as the trainer's model names them.
        given: What the script passes to `LLM`.
    """
    overrides = given.get("hf_overrides") or {}
    if not isinstance(overrides, Mapping):
        raise EngineDeclinedError(
            f"hf_overrides is a {type(overrides).__name__}, and the engine of a 4-bit model must add to it; pass a dict"
        )
    # In the model's configuration, since its hash is the key of vLLM's compilation cache: models that differ in which
    # layers are left in 16 bits compile to different graphs.
    layout = {"quant_method": NAME, "four_bit": sorted(names)}
    return {"quantization": NAME, "hf_overrides": {**overrides, "quantization_config": layout}}


@register_quantization_config(NAME)
class SharedFourBitConfig(BitsAndBytesConfig):
    """As vLLM's, save that what is left in 16 bits is told by name from the trainer's model, not from a skip list.

    A skip list names the checkpoint's linears, and vLLM's has the fused ones: `q_proj` in it leaves nothing out of
    `qkv_proj`.
    """

    def __init__(self, four_bit: Iterable[str]) -> None:
        super().__init__(load_in_4bit=True)
        self._four_bit = frozenset(four_bit)

    @classmethod
    def get_name(cls) -> Any:
        """The name in vLLM's registry."""
        return NAME

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SharedFourBitConfig:
        """Read what :func:`llm_kwargs` put into the model's configuration."""
        return cls(config["four_bit"])

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How vLLM multiplies by this layer.

        Raises:
            EngineDeclinedError: Some of the linears that vLLM joins in it are in 4 bits and some are not.
        """
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        parts = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]
        plain = [part for part in parts if part not in self._four_bit]
        if len(plain) == len(parts):
            return UnquantizedLinearMethod()
        if plain:
            packed = next(part for part in parts if part in self._four_bit)
            names = ", ".join(part.rpartition(".")[2] for part in parts)
            raise EngineDeclinedError(
                f"{plain[0]} is left in 16 bits and {packed} is in 4, and vLLM keeps {names} in one tensor; put all of "
                "them into llm_int8_skip_modules or none"
            )
        return BitsAndBytesLinearMethod(self)
