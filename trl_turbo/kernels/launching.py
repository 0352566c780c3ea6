"""Triton launches that ask the host for less, once a kernel is compiled for arguments of their kind.

`kernel[grid](...)` binds, types and hashes all arguments each time: some 50 us on the host of one H200, where a layer
of 1.5B parameters makes a dozen launches for a few thousand tokens. What it finds depends on little of an argument, and
what it gives back, the compiled kernel, can be launched itself.
"""

from __future__ import annotations

from typing import Any

import torch

from .rows import current_device

# By kernel and all that Triton compiles one anew for: what was compiled, and the constants that follow its arguments
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
# Before Triton 3.3 a compiled kernel is launched without its constants: its launcher counts, and says so
_direct = True


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """`kernel[(programs,)](*arguments, **constants)` on the current device and its current stream.

    Args:
        kernel: A function under `triton.jit`, all of whose constants stand behind its arguments.
        programs: How many to start, in one dimension.
        arguments: A tensor first, then tensors and numbers, in order; every one that is no constant.
        constants: By name, and `num_warps` and the like.
    """
    global _direct
    if not (_direct and _on_gpu(arguments[0])):
        kernel[(programs,)](*arguments, **constants)
        return
    device = current_device()
    key = (kernel.fn, device, *_kinds(arguments), *constants, *constants.values())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[(programs,)](*arguments, **constants)
        names = getattr(kernel, "arg_names", ())[len(arguments) :]
        if compiled is not None and all(name in constants for name in names):
            _compiled[key] = compiled, tuple(constants[name] for name in names)
        return
    compiled, rest = found
    try:
        compiled[programs, 1, 1](*arguments, *rest, stream=_current_stream(device))
    except TypeError:
        _direct = False
        kernel[(programs,)](*arguments, **constants)


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


# The raw one, which Triton asks torch for as well
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda device: torch.cuda.current_stream(device).cuda_stream
)


# Of an argument, beside the numbers from -1 to 1 as they are, a dtype, `float` and what Triton takes for a constant
_OF_32_BITS, _OF_32_BITS_BY_16, _OF_64_BITS, _OF_64_BITS_BY_16, _NOT_AT_16_BYTES = range(2, 7)


def _kinds(arguments: tuple[Any, ...]) -> list[Any]:
    """What of the arguments Triton may compile a kernel anew for.

    In one loop: a kernel takes two dozen, and a layer launches one kernel after the other.
    """
    kinds: list[Any] = []
    add = kinds.append
    for x in arguments:
        kind = type(x)
        if kind is int:
            if -1 <= x <= 1:
                add(x)
            elif -0x80000000 <= x < 0x80000000:
                add(_OF_32_BITS if x & 15 else _OF_32_BITS_BY_16)
            else:
                add(_OF_64_BITS if x & 15 else _OF_64_BITS_BY_16)
        elif kind is float:
            add(float)
        elif kind is bool or x is None:
            add((x,))  # True is no 1
        else:
            add(x.dtype)
            if x.data_ptr() & 15:
                add(_NOT_AT_16_BYTES)
    return kinds
