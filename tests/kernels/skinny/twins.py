"""The Triton kernels against plain torch in float64, run by `tests/kernels/test_triton.py` in a process of its own."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.poison import poisoned
from tests.kernels.skinny.cases import allowed_gated, allowed_linear, make
from trl_turbo.kernels.gated import ACTIVATIONS
from trl_turbo.kernels.skinny import Workspace
from trl_turbo.kernels.skinny.kernel import skinny_gated_triton, skinny_linear_triton
from trl_turbo.kernels.skinny.reference import skinny_gated_reference, skinny_linear_reference
from trl_turbo.kernels.skinny.tiles import Tile

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter computes bf16 wrongly, and compiled there is no float32; each with numbers up to 1e38
WIDE = torch.bfloat16 if CUDA else torch.float32
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, WIDE], ids=str)
each_m = pytest.mark.parametrize(
    ("m", "dtype"), [(1, torch.float16), (8, torch.float16), (16, torch.float16), (3, WIDE)], ids=str
)
#: N, K, rows of a program and columns at a time: all whole, rests of both, an odd number of rows and few columns
SHAPES = [(32, 64, 16, 32), (37, 80, 16, 32), (16, 48, 7, 64)]
each_shape = pytest.mark.parametrize(("n", "k", "rows", "block_k"), SHAPES)


def gated(x, weight, activation, tile):
    before = x.clone(), weight.clone()
    with poisoned():
        found = skinny_gated_triton(x, weight, activation, tile)
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])
    assert found.dtype == x.dtype
    return found


def linear(x, weight, bias, tile, workspace=None):
    """In scratch that is NaN before, with counters that are at zero after."""
    scratch = (workspace or Workspace()).of(x.device, len(weight), tile.split) if tile.split > 1 else None
    if scratch:
        scratch[0].fill_(torch.nan)
    with poisoned():
        found = skinny_linear_triton(x, weight, bias, tile, scratch)
    assert scratch is None or not scratch[1].any()
    assert found.dtype == x.dtype
    return found


def check_gated(x, weight, activation, tile):
    found = gated(x, weight, activation, tile)
    truth = skinny_gated_reference(x.double(), weight.double(), activation)
    assert ((found.double() - truth).abs() <= allowed_gated(x, weight, activation)).all()


def check_linear(x, weight, bias, tile):
    found = linear(x, weight, bias, tile)
    truth = skinny_linear_reference(x.double(), weight.double(), None if bias is None else bias.double())
    assert ((found.double() - truth).abs() <= allowed_linear(x, weight, bias)).all()


@each_m
@each_shape
def test_gated(n, k, rows, block_k, m, dtype):
    x, weight, _ = make(m, 2 * n, k, dtype, DEVICE)
    for activation in ACTIVATIONS if m == 3 else ["silu"]:
        check_gated(x, weight, activation, Tile(rows, block_k, 4, 2))


@each_m
@pytest.mark.parametrize("split", [1, 3, 8])
@each_shape
def test_linear(n, k, rows, block_k, split, m, dtype):
    """Eight parts of at most three blocks, too: some have none."""
    x, weight, bias = make(m, n, k, dtype, DEVICE)
    check_linear(x, weight, bias if m in (1, 16) else None, Tile(rows, block_k, 4, 2, split))


@each_dtype
@pytest.mark.parametrize("m", [3, 16])
@each_shape
def test_x_first(n, k, rows, block_k, m, dtype):
    x, weight, bias = make(m, 2 * n, k, dtype, DEVICE)
    check_gated(x, weight, "silu", Tile(rows, block_k, 4, 2, swap=False))
    check_linear(x, weight, bias, Tile(rows, block_k, 4, 2, 3, swap=False))


@each_dtype
def test_rounded_where_two_kernels_write(dtype):
    """Sums of whole numbers are exact in any order, so that nothing but the roundings can differ."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (8, 64), generator=g).to(DEVICE, dtype)
    weight = (torch.randint(-3, 4, (64, 64), generator=g) / 16).to(DEVICE, dtype)
    found = gated(x, weight, "silu", Tile(16, 32, 4, 2))
    if dtype == torch.float32:
        torch.testing.assert_close(found, skinny_gated_reference(x, weight, "silu"), rtol=8 * 2**-23, atol=8 * 2**-23)
    else:
        wanted = skinny_gated_reference(x, weight, "silu")
        once = skinny_gated_reference(x.double(), weight.double(), "silu").to(dtype)
        # Of 256: a last bit of exp can turn a rounding
        assert (found != wanted).sum() <= 2 * CUDA
        assert (once != wanted).sum() > 20


@each_dtype
def test_the_same_bits_in_a_workspace_of_many_calls(dtype):
    workspace = Workspace()
    x, weight, bias = make(5, 37, 160, dtype, DEVICE)
    tile = Tile(16, 32, 4, 2, 5)
    first = linear(x, weight, bias, tile, workspace)
    linear(3 * x, weight, None, tile, workspace)
    linear(*make(16, 64, 160, dtype, DEVICE), tile, workspace)
    assert torch.equal(linear(x, weight, bias, tile, workspace), first)
    assert workspace.of(x.device, 37, 5)[0] is workspace.of(x.device, 37, 5)[0]


def test_parts_are_added_in_their_order():
    """1e8, 1, -1e8: in this order 1 is lost in float32, in another it is not."""
    x = torch.ones(2, 96, device=DEVICE, dtype=WIDE)
    weight = torch.zeros(16, 96, device=DEVICE, dtype=WIDE)
    for column, value in ((0, 1e8), (32, 1.0), (64, -1e8)):
        weight[:, column] = value
    tile = Tile(16, 32, 4, 2, 3)
    assert (linear(x, weight, None, tile) == 0).all()
    assert (linear(x, weight.roll(-32, 1), None, tile) == 0).all()
    assert (linear(x, weight.roll(32, 1), None, tile) == 1).all()


@each_dtype
def test_rows_apart(dtype):
    """Of x and of the weight, with NaN between them."""
    x, weight, bias = make(3, 42, 64, dtype, DEVICE)
    wide = [torch.full((len(y), 96), torch.nan, dtype=dtype, device=DEVICE) for y in (x, weight)]
    for y, of in zip((x, weight), wide, strict=True):
        of[:, :64] = y
    a, b = wide[0][:, :64], wide[1][:, :64]
    tile = Tile(16, 32, 4, 2, 2)
    assert torch.equal(linear(a, b, bias, tile), linear(x, weight, bias, tile))
    assert torch.equal(
        skinny_gated_triton(a, b, "silu", Tile(16, 32, 4, 2)), gated(x, weight, "silu", Tile(16, 32, 4, 2))
    )


def test_a_nan_shows_in_its_row_alone():
    x, weight, _ = make(3, 32, 64, torch.float16, DEVICE)
    x[1, 63] = torch.nan
    for found in (
        linear(x, weight, None, Tile(16, 32, 4, 2, 2)),
        skinny_gated_triton(x, weight, "silu", Tile(16, 32, 4, 2)),
    ):
        assert found.isnan().all(-1).tolist() == [False, True, False]
        assert found.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("wrong", ["a row of x", "a part's share", "gate and up"])
def test_control_planted_errors_are_seen(wrong):
    x, weight, bias = make(8, 32, 96, torch.float16, DEVICE)
    changed, other = x.clone(), weight.clone()
    if wrong == "a row of x":
        changed[[0, 1]] = x[[1, 0]]
    elif wrong == "a part's share":
        other[:, 64:] *= 1.01
    else:
        other = torch.cat(weight.chunk(2)[::-1])
    truth = skinny_linear_reference(x.double(), weight.double(), bias.double())
    found = linear(changed, other, bias, Tile(16, 32, 4, 2, 3))
    assert ((found.double() - truth).abs() > allowed_linear(x, weight, bias)).any()
    truth = skinny_gated_reference(x.double(), weight.double(), "silu")
    found = gated(changed, other, "silu", Tile(16, 32, 4, 2))
    assert ((found.double() - truth).abs() > allowed_gated(x, weight, "silu")).any()
