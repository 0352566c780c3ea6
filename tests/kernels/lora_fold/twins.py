"""The Triton kernels against plain torch, run by `tests/kernels/test_triton.py` in a process of their own."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.lora_fold.layers import bits, bound, entry_bytes, make, wanted
from trl_turbo.kernels.lora_fold import LogTooLargeError, LoraLayer, kernel, reference
from trl_turbo.kernels.lora_fold.table import Tile

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter computes bf16 wrongly
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
CYCLES = 1000 if CUDA else 50  # 0.05 s and more each, interpreted
SMALL = Tile(rows=16, columns=16, warps=1)
# Small ones for the interpreter; on a GPU also what is used there, and sides that make other layouts
TILES = [SMALL, Tile(rows=8, columns=32, warps=2), *([kernel.TILE, Tile(128, 128, 8)] if CUDA else [])]


def some(dtype, **kwargs):
    return make(17, 40, 5, dtype, device=DEVICE, **kwargs)


def copied(layers):
    return [layer._replace(weight=layer.weight.clone()) for layer in layers]


def same(layers, before):
    return all(torch.equal(bits(x.weight), bits(y.weight)) for x, y in zip(layers, before, strict=True))


def check(layers, tile):
    """Fold, compare, restore, compare."""
    before = copied(layers)
    adapters = [(layer.lora_A.clone(), layer.lora_B.clone()) for layer in layers]
    folded = kernel.fold(layers, 1.0, tile)
    log_bytes = 0
    for layer, old in zip(layers, before, strict=True):
        new, lost = wanted(old)
        assert torch.equal(bits(layer.weight), bits(new))
        log_bytes += int(lost.sum()) * entry_bytes(layer)
    assert folded.log_bytes == log_bytes == sum(p.log.nbytes for p in folded.parts)
    assert folded.restore() == 0
    assert same(layers, before)
    for layer, (a, b) in zip(layers, adapters, strict=True):
        assert torch.equal(layer.lora_A, a)
        assert torch.equal(layer.lora_B, b)
    return folded


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_all_shapes_in_one_launch(dtype, tile):
    shapes = [(33, 40, 8), (1, 8, 1), (16, 16, 3), (7, 24, 16), (20, 9, 64)]
    layers = [make(*shape, dtype, seed=i, scaling=0.5 + i, device=DEVICE) for i, shape in enumerate(shapes)]
    folded = check(layers, tile)
    assert folded.log_bytes > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_the_reference(dtype):
    layers = [some(dtype, share=0.03), make(9, 16, 64, dtype, seed=1, device=DEVICE)]
    twins = copied(layers)
    before = copied(layers)
    kernel.fold(layers, 1.0, SMALL)
    reference.fold(twins, 1.0)
    for layer, twin, old in zip(layers, twins, before, strict=True):
        assert not torch.equal(layer.weight, old.weight)
        apart = (layer.weight.double() - twin.weight.double()).abs()
        assert (apart <= bound(layer, twin.weight)).all()


@pytest.mark.parametrize("adapter", DTYPES, ids=str)
def test_kinds_of_layers_beside_each_other(adapter):
    layers = [some(dtype, adapter=adapter, seed=i) for i, dtype in enumerate(DTYPES)]
    layers.append(some(torch.float16)._replace(lora_A=layers[0].lora_A.half(), lora_B=layers[0].lora_B.float()))
    check(layers, SMALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_at_the_ends(dtype):
    """Overflow, infinities, signed zeros, NaN of two kinds and numbers below the normal ones all come back."""
    layer = some(dtype, share=0.3)
    info = torch.finfo(dtype)
    odd = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, info.max, -info.max, info.tiny, info.tiny / 4, -info.tiny / 4]
    layer.weight[3, : len(odd)] = torch.tensor(odd).to(DEVICE, dtype)
    bits(layer.weight)[4, 0] = bits(torch.tensor(torch.nan, dtype=dtype)).item() | 3
    before = copied([layer])
    layer.lora_B[5] = 3e38  # infinite in the sum
    folded = kernel.fold([layer], 1.0, SMALL)
    assert not same([layer], before)
    assert folded.restore() == 0
    assert same([layer], before)


@pytest.mark.parametrize("offset", [0, 1])
def test_views_of_a_fused_tensor(offset):
    """Rows of one tensor whose rows are longer than they; not at 16 bytes with an offset. What lies between stays."""
    a, b = some(torch.float16), make(8, 40, 3, torch.float16, seed=1, device=DEVICE)
    fused = torch.full((17 + 3 + 8, 48), 7.0, dtype=torch.float16, device=DEVICE)
    views = [fused[:17, offset : offset + 40], fused[20:, offset : offset + 40]]
    layers = []
    for view, layer in zip(views, (a, b), strict=True):
        view.copy_(layer.weight)
        layers.append(layer._replace(weight=view))
    before = fused.clone()
    folded = kernel.fold(layers, 1.0, SMALL)
    assert folded.parts[0].table.kind.aligned == (offset == 0)
    changed = fused != before
    assert changed[:17, offset : offset + 40].any()
    assert changed[20:, offset : offset + 40].any()
    assert not changed[17:20].any()
    assert not changed[:, offset + 40 :].any()
    assert not changed[:, :offset].any()
    assert folded.restore() == 0
    assert torch.equal(fused, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_cycles_with_another_adapter_each_time(dtype):
    layer = make(8, 16, 2, dtype, device=DEVICE)
    before = copied([layer])
    for step in range(CYCLES):
        layer.lora_B.add_(2e-5 * torch.randn(layer.lora_B.shape).to(DEVICE))
        folded = kernel.fold([layer._replace(scaling=1.0 + step % 3)], 1.0, Tile(8, 16, 1))
        assert folded.restore() == 0, step
    assert same([layer], before)


def test_an_adapter_that_adds_nothing_has_an_empty_log():
    layer = some(torch.float16)
    layer.lora_B.zero_()
    assert check([layer], SMALL).log_bytes == 0
    assert check([make(5, 8, 0, torch.float16, device=DEVICE)], SMALL).log_bytes == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", ["bit", "neighbours", "rows", "tiles"])
def test_a_change_in_between_is_noticed(what, dtype):
    layer = some(dtype)
    layer.lora_B.zero_()  # else an exchanged element would be told by its other sum alone
    folded = kernel.fold([layer], 1.0, SMALL)
    weight, (row, column) = layer.weight, {"neighbours": (0, 1), "rows": (1, 0), "tiles": (16, 16)}.get(what, (0, 0))
    if what == "bit":
        bits(weight)[0, 0] ^= 1
    else:
        weight[0, 0], weight[row, column] = weight[row, column].clone(), weight[0, 0].clone()
    assert folded.restore() == (2 if what == "tiles" else 1)


def test_a_changed_adapter_is_noticed():
    layer = some(torch.float16)
    folded = kernel.fold([layer], 1.0, SMALL)
    layer.lora_A.mul_(1.5)
    assert folded.restore() == 6


def test_control_without_the_log_bits_are_lost():
    layer = some(torch.float16)
    before = copied([layer])
    folded = kernel.fold([layer], 1.0, SMALL)
    folded.parts[0].ends.zero_()
    assert folded.restore() > 0
    assert not same([layer], before)


def test_a_log_that_grows_too_large_leaves_the_base_as_it_was():
    layer = some(torch.float16, share=100.0)
    before = copied([layer])
    with pytest.raises(LogTooLargeError, match=r"takes \d+% of the folded weights' memory, and 25% is allowed"):
        kernel.fold([layer], 0.25, SMALL)
    assert same([layer], before)


@pytest.mark.parametrize("at", ["log", "second launch"])
def test_an_error_halfway_leaves_the_base_as_it_was(at, monkeypatch):
    layers: list[LoraLayer] = [some(torch.float16), some(torch.float32)]
    before = copied(layers)
    folds = []
    launch, zeros = kernel._launch, torch.zeros

    def failing_launch(jitted, part, *tensors, **constants):
        if jitted is kernel.fold_kernel:
            folds.append(part)
            if len(folds) == 2:
                assert not same(layers, before)
                raise MemoryError
        launch(jitted, part, *tensors, **constants)

    def failing_zeros(size, **kwargs):
        if kwargs["dtype"] == torch.int64:  # the second log, the float32 weight's
            raise MemoryError
        return zeros(size, **kwargs)

    if at == "log":
        monkeypatch.setattr(kernel.torch, "zeros", failing_zeros)
    else:
        monkeypatch.setattr(kernel, "_launch", failing_launch)
    with pytest.raises(MemoryError):
        kernel.fold(layers, 1.0, SMALL)
    assert same(layers, before)


def test_a_change_between_the_launches_writes_nothing_beside_the_log(monkeypatch):
    layer = some(torch.float16)
    launch, zeros, buffers = kernel._launch, torch.zeros, []

    def guarded(size, **kwargs):
        buffers.append(torch.full((size + 2000,), -7, **kwargs))
        return buffers[-1][:size].zero_()

    def late(jitted, *args, **kwargs):
        if jitted is kernel.fold_kernel:
            layer.lora_B.mul_(100)  # more is lost now than was counted
        launch(jitted, *args, **kwargs)

    monkeypatch.setattr(kernel.torch, "zeros", guarded)
    monkeypatch.setattr(kernel, "_launch", late)
    folded = kernel.fold([layer], 1.0, SMALL)
    monkeypatch.setattr(kernel.torch, "zeros", zeros)
    log = folded.parts[0].log
    assert (buffers[-1][len(log) :] == -7).all()
    assert (log == 0).all()  # no tile lost as many as were counted
    assert folded.restore() > 0
