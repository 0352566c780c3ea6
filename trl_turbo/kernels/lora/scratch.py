"""One buffer for dequantised weights, used again by each linear."""

from __future__ import annotations

import math
import threading

import torch

_lock = threading.Lock()
_buffers: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}


class buffer:  # noqa: N801 (a context manager, without the host's time that one made of a generator takes)
    """A tensor to fill and to multiply by before the block ends; its values are gone after it.

    There is one for a device, a dtype and a stream, as large as the largest asked for. Backward runs in a thread of its
    own on CUDA: the lock makes sure that nothing else is put into the stream between the filling and the multiplying.

    Args:
        shape: Of the tensor.
        dtype: Its dtype.
        device: Where it is.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device

    def __enter__(self) -> torch.Tensor:
        _lock.acquire()
        try:
            return self._tensor()
        except BaseException:
            _lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        _lock.release()

    def _tensor(self) -> torch.Tensor:
        count, device = math.prod(self._shape), self._device
        key = device, self._dtype, _stream(device)
        own = _capturing(device)  # a graph's memory is the graph's own
        held = None if own else _buffers.get(key)
        if held is None or held.numel() < count:
            if not own:
                _buffers.pop(key, None)
            held = torch.empty(count, dtype=self._dtype, device=device)
            if not own:
                _buffers[key] = held
        return held[:count].view(self._shape)


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
