"""Linear layers of a decode step: few rows, so that the time is that of reading the weight once."""

from __future__ import annotations

from .op import fits, skinny_gated, skinny_linear
from .workspace import Workspace

__all__ = ["Workspace", "fits", "skinny_gated", "skinny_linear"]
