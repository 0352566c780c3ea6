"""Linears with LoRA adapters over a frozen base, and the gated MLP of three of them, that keep little for backward."""

from .base import Dense, EightBit, FourBit
from .op import lora_linear, lora_mlp, lora_qkv
from .spec import Adapter, Base, Projection, together

__all__ = [
    "Adapter",
    "Base",
    "Dense",
    "EightBit",
    "FourBit",
    "Projection",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "together",
]
