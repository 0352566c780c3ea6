"""Root-mean-square norms of rows, with and without a residual added first."""

from __future__ import annotations

from .op import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
