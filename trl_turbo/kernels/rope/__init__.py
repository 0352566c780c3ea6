"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from .op import rope

__all__ = ["rope"]
