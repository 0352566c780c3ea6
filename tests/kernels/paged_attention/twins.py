"""The Triton kernel against plain torch; run by `test_triton.py` with Triton's interpreter on or off."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.paged_attention.cases import Case, Made, made
from trl_turbo.kernels.paged_attention import kernel
from trl_turbo.kernels.paged_attention.reference import paged_decode_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
CASES = {
    "one token each": Case(lengths=(1, 1)),
    "ragged": Case(lengths=(33, 0, 1, 97, 32), parts=2),
    "ragged, in short tiles": Case(lengths=(33, 0, 1, 197, 64), parts=2, length=70),
    "many parts": Case(lengths=(130, 5), parts=8, length=130),
    "one part": Case(lengths=(70,), parts=1),
    "one group": Case(lengths=(40, 41), heads=2, kv_heads=2, parts=3),
    "seven heads": Case(lengths=(40,), heads=7, kv_heads=1, parts=3),
    "more heads than rows": Case(lengths=(40,), heads=18, kv_heads=1, parts=2),
    "head of 80": Case(lengths=(35, 36), dim=80, rotary=32, parts=2),
    "neighbours": Case(lengths=(35, 36), interleaved=True, parts=2),
    "rotated before": Case(lengths=(64, 65), rotary=0, parts=2),
    "window": Case(lengths=(100, 7, 20), window=20, parts=2),
    "softcap": Case(lengths=(50, 3), softcap=5.0, spread=3.0, parts=2),
    "large scores": Case(lengths=(90,), spread=6.0, parts=3),
    "blocks of 32": Case(lengths=(50, 77), block=32, parts=2),
}


def run(case: Case, given: Made) -> torch.Tensor:
    query = given.arguments[0]
    out = torch.full(query.shape, float("nan"), dtype=query.dtype, device=query.device)
    return kernel.paged_decode_triton(given.step, out, most_parts=case.parts, length=case.length)


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    return (result.double() - truth).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_as_plain_torch(name, dtype):
    case = CASES[name]
    given = made(case, dtype, DEVICE)
    exact, plain = given.copied(torch.float64), given.copied(dtype)
    result = run(case, given)
    truth, same = paged_decode_reference(exact.step), paged_decode_reference(plain.step)
    rows = given.arguments[6] > 0
    # Both round queries and keys after the turn; beyond that the kernel rounds the weights of a block, at most 1 each,
    # and the result: an error of two roundings of the largest value. `same` has the part that both share
    ulp = torch.finfo(dtype).eps
    bound = (
        2 * error(same[rows], truth[rows])
        + 2 * ulp * exact.arguments[2].abs().max().clamp(min=exact.arguments[4].abs().max()).item()
    )
    assert error(result[rows], truth[rows]) <= bound
    for mine, theirs in zip(given.arguments[3:5], plain.arguments[3:5], strict=True):
        # The new token is in its slot, within a rounding of the turn, and nothing else has changed
        assert (mine.double() - theirs.double()).abs().max().item() <= 2 * ulp * theirs.double().abs().max().item()
        slots = given.arguments[7][rows]
        others = torch.ones(mine.shape[:2], dtype=torch.bool, device=mine.device)
        others[slots // case.block, slots % case.block] = False
        assert torch.equal(mine[others], theirs[others])
    assert all((room[1] == 0).all() for rooms in kernel._rooms.values() for room in rooms)


def test_tiles_by_length_and_width():
    short, long = kernel.SHORT, kernel.LONG
    assert [kernel.tile_of(n, 256) for n in (25, kernel.LONG_FROM, 5000)] == [short, long, long]
    assert kernel.tile_of(25, 512) == short
    assert [kernel.tile_of(80, wide).tokens for wide in (32, 512, 1024, 2048)] == [128, 64, 32, 16]


def test_the_same_bits_again():
    case = CASES["many parts"]
    results = [run(case, made(case, torch.float16, DEVICE)) for _ in range(2)]
    assert torch.equal(*results)


@pytest.mark.skipif(not CUDA, reason="captures a CUDA graph")
def test_in_a_graph_at_other_lengths():
    case = Case(lengths=(200, 1, 77), heads=12, kv_heads=2, dim=128, rotary=128)
    given = made(case, torch.bfloat16, DEVICE)
    before = tuple(x.clone() for x in given.arguments[3:5])
    out = torch.empty_like(given.arguments[0]).contiguous()
    kernel.paged_decode_triton(given.step, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.paged_decode_triton(given.step, out)
    lens, slots, positions = given.arguments[6], given.arguments[7], given.keywords["rotation"].positions
    for shorter in (0, 3, 40):
        for mine, theirs in zip(given.arguments[3:5], before, strict=True):
            mine.copy_(theirs)
        new = torch.tensor([max(1, n - shorter) for n in case.lengths], device=DEVICE)
        lens.copy_(new)
        positions.copy_(new - 1)
        slots.copy_(
            given.arguments[5].gather(1, ((new - 1) // case.block)[:, None])[:, 0] * case.block + (new - 1) % 16
        )
        plain = given.copied(torch.bfloat16)
        graph.replay()
        again = out.clone()
        graph.replay()
        assert torch.equal(out, again)
        truth = paged_decode_reference(plain.step)
        assert error(out, truth.double()) <= 4 * 2**-8 * given.arguments[4].abs().max().item()
