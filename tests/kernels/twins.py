"""Each Triton kernel against its torch twin. Runs in a process of its own (`test_triton.py`), because Triton decides
when it is imported whether it interprets (on the CPU) or compiles (on a GPU).
"""

from __future__ import annotations

import math

import pytest
import torch

from trl_turbo.kernels.linear_logprob import kernel, passes, tiles
from trl_turbo.kernels.linear_logprob.spec import OUTPUTS, Transform

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter computes bf16 wrongly
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
TRANSFORMS = [Transform(), Transform(temperature=0.7, logit_scale=1.3), Transform(temperature=1.4, softcap=3.0)]
POISON = math.nan


def inputs(n: int, v: int, dtype: torch.dtype, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, v, generator=g) * 3).to(DEVICE, dtype)
    bias = torch.randn(v, generator=g).to(DEVICE)
    targets = torch.randint(0, v, (n,), generator=g).to(DEVICE)
    return logits, bias, targets


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """Two orders of operations in float32, at logits near 30: p = exp(z - lse) moves by as many units. Then one
    rounding to `dtype`, which may fall to either side.
    """
    eps = torch.finfo(dtype).eps
    scale = wanted.float().nan_to_num(0, 0, 0).abs().amax().clamp(min=1.0).item()
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2 * eps, atol=64 * 2**-24 * scale, equal_nan=True)


def folded(ops, logits, bias, targets, transform, outputs, width, head=None):
    """Fold all tiles of `width`; with a head [V, H] also sum the tiles' products, as the forward pass does."""
    n, v = logits.shape
    stats = torch.full((tiles.N_STATS, n), POISON, device=DEVICE)
    acc = None if head is None else torch.full((n, head.shape[1]), POISON, device=DEVICE)
    buffer = torch.full((n, width + 3), POISON, device=DEVICE, dtype=logits.dtype)
    for v0 in range(0, v, width):
        part = logits[:, v0 : v0 + width]
        buffer.fill_(POISON)
        tile = buffer[:, : part.shape[1]]
        tile.copy_(part)
        v1 = v0 + part.shape[1]
        ops.fold(tile, None if bias is None else bias[v0:v1], targets, stats, acc, v0, transform, outputs)
        if acc is None:
            torch.testing.assert_close(tile, part, rtol=0, atol=0, equal_nan=True)
        else:
            passes._accumulate(acc, tile, head[v0:v1].to(tile.dtype), first=v0 == 0)
        assert buffer[:, part.shape[1] :].isnan().all()
    return stats, acc


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("transform", "has_bias"), zip(TRANSFORMS, (False, True, True), strict=True), ids=str)
@pytest.mark.parametrize(("n", "v", "width"), [(1, 1, 1), (5, 77, 32), (3, 300, 300), (2, 2500, 2048)])
def test_fold(dtype, transform, has_bias, n, v, width):
    logits, bias, targets = inputs(n, v, dtype)
    bias = bias if has_bias else None
    found, _ = folded(kernel, logits, bias, targets, transform, OUTPUTS, width)
    wanted, _ = folded(tiles, logits, bias, targets, transform, OUTPUTS, width)
    close(found, wanted, torch.float32)


@pytest.mark.parametrize("output", OUTPUTS)
def test_fold_writes_only_what_is_asked(output):
    logits, _, targets = inputs(4, 70, torch.float32)
    found, _ = folded(kernel, logits, None, targets, Transform(), (output,), 32)
    wanted, _ = folded(tiles, logits, None, targets, Transform(), (output,), 32)
    answer = tiles.finish(found, 70, (output,))
    close(getattr(answer, output), getattr(tiles.finish(wanted, 70, (output,)), output), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("transform", "has_bias"), zip(TRANSFORMS, (False, True, True), strict=True), ids=str)
@pytest.mark.parametrize(("n", "v", "width", "h"), [(1, 3, 2, 1), (5, 77, 32, 40), (2, 2500, 2048, 1100)])
def test_fold_with_sums_and_jacobian(dtype, transform, has_bias, n, v, width, h):
    logits, bias, targets = inputs(n, v, dtype)
    logits = logits.sort(-1).values  # the maximum moves with every tile
    bias = bias if has_bias else None
    head = torch.randn(h, v, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).t()  # strided on purpose
    out = []
    for ops in (kernel, tiles):
        stats, acc = folded(ops, logits, bias, targets, transform, ("logps",), width, head)
        # NaN in what is written, and in the columns beside it, which must stay
        jac = torch.full((n, h + 1), POISON, device=DEVICE, dtype=dtype)
        ops.jacobian(acc, stats, head, targets, transform, jac[:, :h])
        assert jac[:, h:].isnan().all()
        out.append(jac[:, :h])
    found, wanted = out
    assert not found.isnan().any()
    # A weight that rounds to the other side moves its product with the head (below 4) by a unit of `dtype`; logits
    # near 20 move every weight by 20 units of float32
    atol = 4 * (2 * torch.finfo(dtype).eps + 20 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize(
    ("has_bias", "logps", "entropy"), [(True, True, True), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize(("n", "v", "v0"), [(1, 1, 0), (5, 77, 40), (2, 4099, 0)])
def test_grad_tile(dtype, transform, has_bias, logps, entropy, n, v, v0):
    logits, bias, targets = inputs(n, v, dtype)
    targets = targets + v0
    g = torch.Generator().manual_seed(2)
    top = logits.float().amax(-1)
    norm = torch.stack((top, logits.float().logsumexp(-1) - top + 1))
    values = [torch.rand(n, generator=g).to(DEVICE) for _ in range(3)]
    results = []
    for ops in (kernel, tiles):
        buffer = torch.full((n, v + 5), POISON, device=DEVICE, dtype=dtype)
        tile = buffer[:, :v]
        tile.copy_(logits)
        ops.grad_tile(
            tile,
            bias if has_bias else None,
            targets,
            norm,
            values[0] if entropy else None,
            values[1] if logps else None,
            values[2] if entropy else None,
            v0,
            transform,
        )
        assert buffer[:, v:].isnan().all()
        results.append(tile.clone())
    close(*results, dtype)


@pytest.mark.parametrize("ops", [kernel, tiles], ids=["triton", "torch"])
def test_infinities_and_nan(ops):
    """A -inf bias rules tokens out (a whole first tile of them here); a NaN stays loud, also in its own row alone."""
    logits, _, targets = inputs(3, 96, torch.float32)
    bias = torch.zeros(96, device=DEVICE)
    bias[:40] = -torch.inf
    targets = targets.clamp(min=40)
    logits[2, 50] = torch.nan
    outputs = ("logps", "entropy", "logsumexp", "logsumexp2", "top1")
    stats, _ = folded(ops, logits, bias, targets, Transform(), outputs, 32)
    answer = tiles.finish(stats, 96, outputs)
    z = logits[:2, 40:]
    log_p = z.log_softmax(-1)
    close(answer.logps[:2], log_p.gather(-1, targets[:2, None] - 40).squeeze(-1), torch.float32)
    close(answer.entropy[:2], -(log_p.exp() * log_p).sum(-1), torch.float32)
    close(answer.logsumexp2[:2], (2 * z).logsumexp(-1), torch.float32)
    assert all(x[2].isnan() for x in (answer.logps, answer.entropy, answer.logsumexp, answer.logsumexp2))


@pytest.mark.parametrize("ops", [kernel, tiles], ids=["triton", "torch"])
@pytest.mark.parametrize("level", [-200.0, 0.0, 80.0])
@pytest.mark.parametrize("with_sums", [False, True])
def test_maximum_far_from_the_first_guess(ops, level, with_sums):
    """A first block of -inf, logits at `level` in the next, and one 90 above those in a later tile."""
    logits = torch.randn(2, 5000, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)) + level
    logits[:, 4500] = level + 90
    bias = torch.zeros(5000, device=DEVICE)
    bias[:1100] = -torch.inf
    targets = torch.tensor([2000, 4500], device=DEVICE)
    head = torch.randn(5000, 4, device=DEVICE) if with_sums else None
    outputs = ("logps", "entropy", "logsumexp", "logsumexp2", "top1")
    stats, _ = folded(ops, logits.clone(), bias, targets, Transform(), outputs, 2500, head)
    answer = tiles.finish(stats, 5000, outputs)
    z = logits.double()[:, 1100:]
    close(answer.logps, z.log_softmax(-1).gather(-1, targets[:, None] - 1100).squeeze(-1), torch.float32)
    close(answer.logsumexp, z.logsumexp(-1), torch.float32)
    close(answer.logsumexp2, (2 * z).logsumexp(-1), torch.float32)
    close(answer.entropy, -(z.softmax(-1) * z.log_softmax(-1)).sum(-1), torch.float32)
    assert answer.top1.tolist() == [False, True]


@pytest.mark.parametrize("ops", [kernel, tiles], ids=["triton", "torch"])
def test_ties_count_for_the_first(ops):
    logits = torch.zeros(4, 64, device=DEVICE)
    logits[:, [7, 40]] = 5.0
    targets = torch.tensor([7, 40, 0, 63], device=DEVICE)
    stats, _ = folded(ops, logits, None, targets, Transform(), ("top1",), 32)
    assert tiles.finish(stats, 64, ("top1",)).top1.tolist() == [True, False, False, False]


@pytest.mark.parametrize("ops", [kernel, tiles], ids=["triton", "torch"])
@pytest.mark.parametrize("target", [-100, -1, 64, 2**40])
def test_target_outside_gives_nan_and_reads_nothing(ops, target):
    logits, _, targets = inputs(2, 64, torch.float32)
    targets[0] = target
    head = torch.randn(64, 8, device=DEVICE)
    stats, acc = folded(ops, logits, None, targets, Transform(), ("logps",), 32, head)
    out = torch.zeros(2, 8, device=DEVICE)
    ops.jacobian(acc, stats, head, targets, Transform(), out)
    logps = tiles.finish(stats, 64, ("logps",)).logps
    assert logps.isnan().tolist() == [True, False]
    assert out.isnan().all(-1).tolist() == [True, False]


@pytest.mark.parametrize("ops", [kernel, tiles], ids=["triton", "torch"])
def test_nearly_certain_target_keeps_its_gradient(ops):
    """At p = 1 - 3e-5 the gradient is what is left of a cancellation, and must not be rounding."""
    logits = torch.zeros(1, 64, device=DEVICE)
    logits[0, 3] = 14.5
    head = torch.randn(64, 8, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    targets = torch.tensor([3], device=DEVICE)
    stats, acc = folded(ops, logits, None, targets, Transform(), ("logps",), 32, head)
    out = torch.empty(1, 8, device=DEVICE)
    ops.jacobian(acc, stats, head, targets, Transform(), out)
    p = logits.double().softmax(-1)
    wanted = head[3].double() - (p @ head.double())
    torch.testing.assert_close(out.double(), wanted, rtol=1e-2, atol=0)


@pytest.mark.skipif(not CUDA, reason="the interpreter takes minutes for so many blocks")
def test_more_blocks_than_a_grid_axis_holds():
    n = 70_001
    logits, _, targets = inputs(n, 130, torch.bfloat16)
    found, _ = folded(kernel, logits, None, targets, Transform(), OUTPUTS, 64)
    wanted, _ = folded(tiles, logits, None, targets, Transform(), OUTPUTS, 64)
    close(found, wanted, torch.float32)
    norm = tiles.norm_of(found)
    a, b = logits.clone(), logits.clone()
    kernel.grad_tile(a, None, targets, norm, None, norm[0], None, 0, Transform())
    tiles.grad_tile(b, None, targets, norm, None, norm[0], None, 0, Transform())
    close(a, b, torch.bfloat16)


def test_gradient_of_an_entropy_that_is_not_there():
    logits, _, targets = inputs(3, 128, torch.float32)
    norm = torch.stack((logits.amax(-1), torch.ones(3, device=DEVICE)))
    for ops in (kernel, tiles):
        with pytest.raises(ValueError, match="without the entropy that it is made from; pass entropy"):
            ops.grad_tile(logits, None, targets, norm, None, None, norm[0], 0, Transform())


@pytest.mark.skipif(not CUDA, reason="4.3 GB of memory")
def test_offsets_past_two_to_the_31():
    """Rows 2^30 elements apart: the third begins at 2^31, where an int32 offset turns negative."""
    stride = 2**30
    wide = torch.empty(2 * stride + 128, device=DEVICE, dtype=torch.bfloat16).as_strided((3, 128), (stride, 1))
    logits, _, targets = inputs(3, 128, torch.bfloat16)
    norm = torch.stack((logits.float().amax(-1), torch.ones(3, device=DEVICE)))
    head = torch.empty(2 * stride + 128, device=DEVICE, dtype=torch.bfloat16).as_strided((3, 128), (stride, 1))
    head.copy_(logits)
    results = []
    for tile in (wide, logits.clone()):
        tile.copy_(logits)
        stats = torch.full((tiles.N_STATS, 3), POISON, device=DEVICE)
        acc = torch.full((3, 8), POISON, device=DEVICE)
        kernel.fold(tile, None, targets, stats, acc, 0, Transform(), OUTPUTS)
        grads = tile.clone()
        tile.copy_(logits)
        kernel.grad_tile(tile, None, targets, norm, None, norm[0], None, 0, Transform())
        out = torch.empty(3, 128, device=DEVICE)
        weight = head if tile is wide else logits
        kernel.jacobian(torch.ones(3, 128, device=DEVICE), stats, weight, targets % 3, Transform(), out)
        results.append((stats, grads, tile.clone(), out))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)
