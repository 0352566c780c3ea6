"""`fold` as it is called: what it refuses, and the plain torch that serves the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.lora_fold.layers import bits, bound, make, wanted
from trl_turbo.kernels.lora_fold import LogTooLargeError, fold, reference, table

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_dtypes_comes_back(dtype, adapter):
    layers = [make(33, 40, 8, dtype, adapter=adapter), make(1, 9, 1, dtype, adapter=adapter, seed=1)]
    before = [layer._replace(weight=layer.weight.clone()) for layer in layers]
    folded = fold(layers)
    for layer, old in zip(layers, before, strict=True):
        new = wanted(old)[0]
        assert ((layer.weight.double() - new.double()).abs() <= bound(layer, new)).all()
    assert not torch.equal(layers[0].weight, before[0].weight)
    assert folded.restore() == 0
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(bits(layer.weight), bits(old.weight))


def test_rows_longer_than_the_weight(monkeypatch):
    monkeypatch.setattr(reference, "PIECE", 5 * 40)
    layer = make(17, 40, 8, torch.bfloat16, share=0.03)
    fused = torch.zeros(20, 48, dtype=torch.bfloat16)
    fused[:17, :40] = layer.weight
    before = fused.clone()
    folded = fold([layer._replace(weight=fused[:17, :40])])
    assert folded.log_bytes
    assert folded.restore() == 0
    assert torch.equal(bits(fused), bits(before))


def test_two_exchanged_elements_are_noticed():
    layer = make(4, 8, 2, torch.bfloat16)
    layer.lora_B.zero_()
    folded = fold([layer])
    assert folded.log_bytes == 0
    layer.weight[0, :2] = layer.weight[0, :2].flip(0)
    assert folded.restore() == 1


def test_nothing_to_fold():
    assert fold([]).restore() == 0
    assert fold([make(0, 8, 2, torch.bfloat16)]).restore() == 0


def test_the_share_of_the_log_is_the_callers():
    layer = make(32, 40, 4, torch.bfloat16, share=0.03)
    with pytest.raises(LogTooLargeError, match="0% is allowed"):
        fold([layer], log_share=0.001)
    assert fold([layer], log_share=0.5).restore() == 0


def test_what_does_not_fit_is_refused():
    layer = make(4, 8, 2, torch.bfloat16)
    with pytest.raises(TypeError, match="float64"):
        fold([layer._replace(weight=layer.weight.double())])
    with pytest.raises(ValueError, match=r"lora_A \[2, 7\]"):
        fold([layer._replace(lora_A=layer.lora_A[:, :7])])
    with pytest.raises(ValueError, match=r"lora_B \[3, 2\]"):
        fold([layer._replace(lora_B=layer.lora_B[:3])])


def test_the_kernel_is_not_for_the_cpu():
    assert not table.takes([make(4, 8, 2, torch.bfloat16)])


def test_a_tile_that_is_too_large_is_refused():
    table.Tile(128, 256, 8)
    with pytest.raises(ValueError, match="more than 32,768 elements"):
        table.Tile(256, 256, 8)


def test_a_table_names_each_tile_once():
    layers = [make(33, 40, 8, torch.bfloat16), make(1, 8, 1, torch.bfloat16)]
    (found,) = table.tables(layers, table.Tile(16, 32, 1))
    assert found.layer.tolist() == [0] * 6 + [1]
    rows = found.fields.tolist()
    assert [row[3:7] for row in rows] == [[33, 40, 40, 8], [1, 8, 8, 1]]
    assert [row[8:] for row in rows] == [[0, 6], [6, 1]]
    assert rows[0][:3] == [tensor.data_ptr() for tensor in layers[0][:3]]
