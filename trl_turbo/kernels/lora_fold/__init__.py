"""LoRA adapters added to their base weights in place, and taken out again to the bit."""

from .op import fold
from .spec import Folded, LogTooLargeError, LoraLayer

__all__ = ["Folded", "LogTooLargeError", "LoraLayer", "fold"]
