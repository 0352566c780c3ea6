"""Attention of one decode step over a paged cache, with the new token's rotation and its place in that cache."""

from __future__ import annotations

from .op import Rotation, paged_decode

__all__ = ["Rotation", "paged_decode"]
