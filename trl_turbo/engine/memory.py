"""What an engine costs, in bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

_MIB = 1 << 20


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by part.

    Attributes:
        shared_bytes: The trainer's weights that vLLM reads in place, with the scales of 4-bit ones: no cost.
        copied_bytes: Weights that vLLM holds a copy of: 0 for a shared engine.
        padding_bytes: What joining tensors added, such as the rows of a padded vocabulary.
        kv_bytes: The KV cache while it is there.
        lora_bytes: vLLM's adapter buffers.
        graph_bytes: CUDA graphs, as vLLM measured them while it captured.
        kv_released: Whether the KV cache is given up at the moment.
    """

    shared_bytes: int
    copied_bytes: int
    padding_bytes: int
    kv_bytes: int
    lora_bytes: int
    graph_bytes: int
    kv_released: bool = False

    def to_dict(self) -> dict[str, int | bool]:
        """Return the report as a plain dict."""
        return asdict(self)

    def __str__(self) -> str:
        parts = {name.removesuffix("_bytes"): value for name, value in asdict(self).items() if name.endswith("_bytes")}
        return ", ".join(f"{name} {value / _MIB:,.1f} MiB" for name, value in parts.items())
