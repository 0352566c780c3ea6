"""One buffer for dequantised weights, used again by each linear."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_buffers: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}


@contextmanager
def buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[torch.Tensor]:
    """A tensor to fill and to multiply by before the block ends; its values are gone after it.

    There is one for a device, a dtype and a stream, as large as the largest asked for. Backward runs in a thread of its
    own on CUDA: the lock makes sure that nothing else is put into the stream between the filling and the multiplying.
    """
    count = int(torch.Size(shape).numel())
    with _lock:
        key = (device, dtype, _stream(device))
        held = None if _capturing(device) else _buffers.get(key)
        if held is None or held.numel() < count:
            _buffers.pop(key, None)
            held = torch.empty(count, dtype=dtype, device=device)
            if not _capturing(device):  # a graph's memory is the graph's own
                _buffers[key] = held
        yield held[:count].view(shape)


def release() -> None:
    """Give all buffers back."""
    with _lock:
        _buffers.clear()


def held_bytes() -> int:
    """What all buffers take."""
    with _lock:
        return sum(held.nbytes for held in _buffers.values())


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
