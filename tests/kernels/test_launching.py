"""The short way to launch a compiled kernel against Triton's own, both ending in a launcher that only takes notes.

A driver that stands for a Hopper card lets Triton itself bind, specialise and compile, ptxas included; nothing runs.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from trl_turbo.kernels import launching  # noqa: E402
from trl_turbo.kernels.rms_norm.kernel import forward_kernel  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not isinstance(forward_kernel, JITFunction), reason="Triton interprets here"),
    pytest.mark.skipif(not hasattr(type(driver), "active"), reason="its driver is asked for other things before 3.4"),
    # What a compiled kernel does at its end asks for a driver, and the test's is gone by then
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Driver:
    """As much of Triton's driver as a launch asks for."""

    def __init__(self):
        self.launched = []
        properties = {"max_shared_mem": 232448, "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            load_binary=lambda *_: ("module", "function", 0, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: properties,
        )

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, src, metadata):
        """What a compiled kernel is run by: with grid, stream and function, then what the kernel is, then arguments."""
        return lambda *given: self.launched.append((src.hash(), *given))


@pytest.fixture
def card(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = Driver()
    # A property over it from Triton 3.4 on
    monkeypatch.setattr(driver, "_active" if hasattr(type(driver), "active") else "active", made, raising=False)
    monkeypatch.setattr(launching, "_on_gpu", lambda _: True)
    monkeypatch.setattr(launching, "current_device", made.get_current_device)
    monkeypatch.setattr(launching, "_current_stream", made.get_current_stream)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_direct", True)
    monkeypatch.setattr(
        forward_kernel, "device_caches", type(forward_kernel.device_caches)(forward_kernel.create_binder)
    )
    return made


def norm(rows, width, *, dtype=torch.float16, offset=0, outer=0, number=0.0):
    """Arguments of a norm's forward over rows of one tensor that starts `offset` elements into its storage."""
    x = torch.zeros(rows * width + offset, dtype=dtype)[offset:].view(rows, width)
    arguments = [x, rows, outer, width] * 2
    arguments += [torch.ones(width, dtype=dtype), torch.empty_like(x), x, torch.empty(rows), rows, 1e-6, number]
    constants = {"ADD": False, "IN_FLOAT32": False, "D": width, "ROWS": 2, "BLOCK": 64, "num_warps": 1}
    return arguments, constants


CALLS = {
    "plain": norm(4, 64),
    "again, of as many rows": norm(4, 64),
    "of more rows": norm(6, 64),
    "of one row, which is a number that Triton makes a constant": norm(1, 64),
    "of a width that 16 does not divide": norm(4, 40),
    "of a width that 8 does not divide": norm(4, 33),
    "beginning where no 16 bytes begin": norm(4, 64, offset=1),
    "of another dtype": norm(4, 64, dtype=torch.float32),
    "of a stride that takes 64 bits": norm(4, 64, outer=1 << 33),
    "of one that takes 32": norm(4, 64, outer=1 << 20),
    "of one that takes 32 and that 16 does not divide": norm(4, 64, outer=(1 << 20) + 8),
    "of one that takes 64 and that 16 does not divide": norm(4, 64, outer=(1 << 33) + 8),
    "with another number": norm(4, 64, number=1.0),
}


def test_compiled_kernels_are_launched_as_triton_launches_them(card):
    for arguments, constants in CALLS.values():
        forward_kernel[(5,)](*arguments, **constants)
    wanted, card.launched = card.launched, []
    for turn in range(2):
        for arguments, constants in CALLS.values():
            launching.launch(forward_kernel, 5, *arguments, **constants)
        assert len(card.launched) == len(wanted)
        for name, mine, triton_s in zip(CALLS, card.launched, wanted, strict=True):
            for one, other in zip(mine, triton_s, strict=True):
                if type(one).__name__ == type(other).__name__ == "LazyDict":  # for profilers, one for each launch
                    continue
                same = one is other or (not isinstance(one, torch.Tensor) and one == other)
                assert same, (turn, name, one, other)
        card.launched = []


def test_launched_without_triton_s_binding_the_second_time(card, monkeypatch):
    arguments, constants = CALLS["plain"]
    launching.launch(forward_kernel, 5, *arguments, **constants)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("bound again"))
    launching.launch(forward_kernel, 5, *arguments, **constants)
    assert len(card.launched) == 2


def test_a_launcher_that_takes_no_constants_is_left_to_triton(card, monkeypatch):
    arguments, constants = CALLS["plain"]
    launching.launch(forward_kernel, 5, *arguments, **constants)

    def counts(*_):
        raise TypeError("function takes exactly 24 arguments (29 given)")

    ((key, (_, rest)),) = launching._compiled.items()
    monkeypatch.setitem(launching._compiled, key, (_Launchable(counts), rest))
    launching.launch(forward_kernel, 5, *arguments, **constants)
    launching.launch(forward_kernel, 5, *arguments, **constants)
    assert len(card.launched) == 3
    assert not launching._direct


class _Launchable:
    """A compiled kernel with another launcher."""

    def __init__(self, launcher):
        self._launcher = launcher

    def __getitem__(self, grid):
        return self._launcher
