"""The gate of a gated MLP (SwiGLU, GEGLU): act(gate) * up."""

from __future__ import annotations

from .op import ACTIVATIONS, gated, gated_backward, gated_forward

__all__ = ["ACTIVATIONS", "gated", "gated_backward", "gated_forward"]
