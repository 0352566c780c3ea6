"""One buffer for dequantised weights, used again by each linear."""

from __future__ import annotations

import math
import threading

import torch

_lock = threading.Lock()
_Key = tuple[torch.device, torch.dtype, int]
_buffers: dict[_Key, torch.Tensor] = {}
# Of those, in the few shapes of a model's linears: to make a view anew takes the host two launches' time
_shaped: dict[tuple[_Key, tuple[int, ...]], torch.Tensor] = {}


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
        shape, device = self._shape, self._device
        if _capturing(device):  # a graph's memory is the graph's own
            return torch.empty(shape, dtype=self._dtype, device=device)
        key = device, self._dtype, _stream(device)
        found = _shaped.get((key, shape))
        if found is not None:
            return found
        count, held = math.prod(shape), _buffers.get(key)
        if held is None or held.numel() < count:
            for other in [other for other in _shaped if other[0] == key]:
                del _shaped[other]
            _buffers.pop(key, None)
            held = None  # given back before a larger one is asked for
            held = _buffers[key] = torch.empty(count, dtype=self._dtype, device=device)
        found = _shaped[key, shape] = held[:count].view(shape)
        return found


def release() -> None:
    """Give all buffers back."""
    with _lock:
        _shaped.clear()
        _buffers.clear()


def held_bytes() -> int:
    """What all buffers take."""
    with _lock:
        return sum(held.nbytes for held in _buffers.values())


def _stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(torch._C._cuda_getCurrentRawStream(index))  # without the object of torch.cuda.current_stream


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
