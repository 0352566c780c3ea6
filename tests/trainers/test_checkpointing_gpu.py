"""What only a CUDA machine can run: copies on a side stream, pinned memory, and what both save."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import trl_turbo
from trl_turbo.patches.checkpointing import offload, tiled
from trl_turbo.patches.checkpointing.lane import CudaLane
from trl_turbo.patches.checkpointing.offload import Offloader

from .adapters import lora
from .lora_models import ALL
from .models import VARIANTS, turn_off
from .parity import skip_unless_known, stock
from .rule import Outcome, assert_identical, assert_same
from .runs import Case, run

pytestmark = [pytest.mark.trl, pytest.mark.gpu]

ON = {"use_cpu": False, "max_steps": 3, "gradient_checkpointing": True, "bf16": True}
NON = {**ON, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
CASES = {
    "grpo": Case("GRPO", {**NON, "beta": 0.1}, dtype=torch.bfloat16),
    "grpo-lora": Case("GRPO", {**NON, "beta": 0.1}, dtype=torch.bfloat16, peft=lora(*ALL)),
    "grpo-reentrant": Case(
        "GRPO", {**ON, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, dtype=torch.bfloat16, peft=lora()
    ),
    "dpo": Case("DPO", NON, dtype=torch.bfloat16),
    "online-dpo": Case("OnlineDPO", NON, dtype=torch.bfloat16),
    "rloo": Case("RLOO", NON, dtype=torch.bfloat16),
    "ppo": Case("PPO", {key: value for key, value in NON.items() if key != "max_steps"}, dtype=torch.bfloat16),
}


@pytest.fixture(autouse=True)
def _cuda() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    yield
    offload.release()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def run_layers(layers: nn.ModuleList, x: torch.Tensor, offloader: Offloader | None) -> list[torch.Tensor]:
    y = x = x.detach().requires_grad_()
    for layer in layers:
        if offloader is None:
            y = checkpoint(layer, y, use_reentrant=False)
        else:
            with saved_tensors_hooks(offloader.pack, offloader.unpack):
                y = checkpoint(layer, y, use_reentrant=False)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in layers.parameters() if p.grad is not None)]
    layers.zero_grad(set_to_none=True)
    return found


def make(count: int, width: int, device: torch.device) -> nn.ModuleList:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(count)]
    return nn.ModuleList(layers).to(device, torch.bfloat16)


@pytest.mark.parametrize("rows", [4096, 33_000, 1001])
def test_to_the_bit_over_many_steps(rows: int, device: torch.device) -> None:
    """While the allocator gives memory that was let go to others at once: a copy that is late would read theirs."""
    layers, x = make(12, 512, device), torch.randn(rows, 512, device=device, dtype=torch.bfloat16)
    offloader = Offloader(CudaLane(device), smallest_bytes=0)
    offloader.costs.worth = lambda nbytes: True  # type: ignore[method-assign]
    expected = run_layers(layers, x, None)
    for _ in range(8):
        for mine, theirs in zip(run_layers(layers, x, offloader), expected, strict=True):
            assert torch.equal(mine, theirs)


def test_copies_that_are_slower_than_layers(device: torch.device) -> None:
    """Layers of next to nothing: everything waits for copies, and nothing is wrong."""
    layers = nn.ModuleList(nn.Tanh() for _ in range(24))
    x = torch.randn(8192, 4096, device=device, dtype=torch.bfloat16)
    offloader = Offloader(CudaLane(device), smallest_bytes=0)
    offloader.costs.worth = lambda nbytes: True  # type: ignore[method-assign]
    expected = run_layers(layers, x, None)
    for _ in range(4):
        for mine, theirs in zip(run_layers(layers, x, offloader), expected, strict=True):
            assert torch.equal(mine, theirs)


def test_what_costs_too_much_stays(device: torch.device) -> None:
    report = trl_turbo.patch(verbose=False)
    layers = nn.ModuleList(nn.Tanh() for _ in range(24))
    x = torch.randn(8192, 4096, device=device, dtype=torch.bfloat16)
    offloader = Offloader(CudaLane(device), smallest_bytes=0)
    for _ in range(4):
        run_layers(layers, x, offloader)
        torch.cuda.synchronize()
    assert not offloader.costs.worth(x.nbytes)
    assert any("they stay on the device" in note.text for note in report.notes)


def test_device_memory_does_not_grow_with_layers(device: torch.device) -> None:
    """Inputs are much larger than weights, whose gradients do grow."""
    x = torch.randn(32_768, 1024, device=device, dtype=torch.bfloat16)

    def peak(count: int, offloads: bool) -> int:
        made = [nn.Sequential(nn.Linear(1024, 1024), nn.Tanh()) for _ in range(count)]
        layers = nn.ModuleList(made).to(device, torch.bfloat16)
        offloader = Offloader(CudaLane(device), 0) if offloads else None
        if offloader is not None:
            offloader.costs.worth = lambda nbytes: True  # type: ignore[method-assign]
        run_layers(layers, x, offloader)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_layers(layers, x, offloader)
        return torch.cuda.max_memory_allocated() - before

    assert peak(16, offloads=False) - peak(4, offloads=False) > 11 * x.nbytes
    assert peak(16, offloads=True) - peak(4, offloads=True) < 2 * x.nbytes


def assert_stocks(case: Case, ours: Outcome, plain: Outcome) -> None:
    """To the bit, where stock repeats itself to the bit on this device; else by the rule."""
    trl_turbo.unpatch()
    try:
        assert_identical(plain, run(case))
    except AssertionError:
        assert_same(plain, ours, [run(case, variant) for variant in VARIANTS[1:]], case.dtype)
    else:
        assert_identical(plain, ours)


@pytest.mark.parametrize("name", CASES)
def test_trainings_are_stocks_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    case = CASES[name]
    skip_unless_known(case)
    plain = run(case)
    turn_off(monkeypatch)
    found = Offloader(CudaLane(device), smallest_bytes=0)
    monkeypatch.setattr(offload, "offloader_of", lambda _: found)
    trl_turbo.patch(checkpointing=True, strict=True, verbose=False)
    ours = run(case)
    assert found.lane.grown == 1
    assert_stocks(case, ours, plain)


@pytest.mark.parametrize("name", ["grpo", "grpo-lora", "dpo"])
def test_tiles_train_as_stock_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    plain, *perturbed = stock(case)
    turn_off(monkeypatch)
    monkeypatch.setattr(tiled, "TILE_ROWS", 16)
    trl_turbo.patch(mlp_tiling=True, strict=True, verbose=False)
    assert_same(plain, run(case), perturbed, case.dtype)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_optimizers_in_eight_bits(optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script asks for it, and nothing of ours is in its way: what it updates is stock's."""
    pytest.importorskip("bitsandbytes")
    case = Case("GRPO", {**NON, "optim": optim}, peft=lora(*ALL))
    plain = run(case)
    turn_off(monkeypatch)
    trl_turbo.patch(checkpointing=True, memory=True, strict=True, verbose=False)
    assert_stocks(case, run(case), plain)


def test_peaks_are_the_drivers(device: torch.device) -> None:
    trl_turbo.patch(memory=True, strict=True, verbose=False)
    run(CASES["grpo"])
    free, total = torch.cuda.mem_get_info(device)
    found: Any = trl_turbo.status().peaks
    assert 0 < found["training"]["measured"] <= total
    assert abs(found["training"]["measured"] - (total - free)) < 256 << 20
    assert found["training"]["predicted"] > 0
