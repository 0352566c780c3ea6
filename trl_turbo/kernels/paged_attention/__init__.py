"""Attention of one decode step over a paged cache, with the new token's rotation and its place in that cache."""

from __future__ import annotations

from .op import paged_decode
from .spec import Rotation, Step

__all__ = ["Rotation", "Step", "paged_decode"]
