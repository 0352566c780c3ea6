"""What an engine raises."""

from __future__ import annotations


class EngineDeclinedError(RuntimeError):
    """A model, a setting or a version that the engine does not share weights with; its text says why, in one sentence.

    The caller leaves generation to TRL's own path and notes the sentence in the report.
    """


class WeightsMovedError(RuntimeError):
    """A weight of the trainer no longer lies where vLLM reads it, and cannot be put back there."""
