"""Causal attention over packed sequences of any lengths, which may share a prompt that is there once."""

from __future__ import annotations

from .op import attention
from .segments import Segments

__all__ = ["Segments", "attention"]
