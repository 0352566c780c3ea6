"""Batches that attention is compared on, and the comparison."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trl_turbo.kernels.attention import Segments, reference
from trl_turbo.kernels.attention.spec import Spec
from trl_turbo.kernels.linear_logprob.reference import excess_error


class Case(NamedTuple):
    """Segments, and how they are attended."""

    lengths: list[int]
    prefix: list[int] | None = None
    heads: int = 4
    key_heads: int = 2
    width: int = 16
    window: int | None = None
    softcap: float | None = None

    @property
    def spec(self) -> Spec:
        return Spec(self.width**-0.5, self.window, self.softcap)

    @property
    def kwargs(self) -> dict[str, float | int | None]:
        return {"window": self.window, "softcap": self.softcap}

    def segments(self, device: str = "cpu") -> Segments:
        return Segments.build(self.lengths, self.prefix, device)

    def tensors(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[torch.Tensor]:
        """q, k, v and the gradient of the result."""
        g = torch.Generator().manual_seed(seed)
        heads = (self.heads, self.key_heads, self.key_heads, self.heads)
        return [torch.randn(sum(self.lengths), n, self.width, generator=g).to(device, dtype) for n in heads]


SHARED = ([40, 21, 0, 50, 1, 18], [-1, 0, 0, 0, 0, -1])
#: Prompts behind their completions, two beside each other, one that nobody shares, one that is empty.
MIXED = ([19, 37, 0, 33, 1, 26, 0, 9], [1, -1, 1, 1, 1, -1, -1, 6])
CASES = {
    "ragged": Case([5, 0, 50, 1, 33]),
    "one token": Case([1]),
    "one head": Case([19, 18], heads=1, key_heads=1),
    "shared": Case(*SHARED, key_heads=1),
    "mixed": Case(*MIXED),
    "one completion": Case([17, 50], [-1, 0], heads=6),
    "window": Case([5, 0, 50, 1, 33], window=9),
    "window of one": Case([20, 9], [-1, 0], window=1),
    "prompt longer than the window": Case(*SHARED, window=13),
    "window longer than a block": Case(*SHARED, window=45),
    "mixed, window": Case(*MIXED, window=21),
    "softcap": Case([40, 25], [-1, 0], softcap=3.0),
    "softcap and window": Case(*MIXED, window=30, softcap=5.0, heads=2, key_heads=1),
}
WIDTHS = {
    f"width {width}": Case([20, 23], [-1, 0], heads=2, key_heads=1, width=width) for width in (8, 64, 80, 96, 128, 256)
}


def by_autograd(fn: object, case: Case, tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The result and the gradients of q, k and v, by plain torch in `dtype`."""
    q, k, v, grad = tensors
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    o = fn(*leaves, case.segments(q.device.type), case.spec)  # type: ignore[operator]
    return [o.detach(), *torch.autograd.grad(o, leaves, grad.to(dtype))]


def check(
    found: list[torch.Tensor],
    case: Case,
    tensors: list[torch.Tensor],
    slack: float | None = None,
    roundings: int = 2,
) -> None:
    """No further from float64 than plain torch in the same dtype; few numbers scatter, and may be twice as far.

    The largest error is one element's luck: so many `roundings` of the largest number are allowed in any case.
    Gradients of q and k are differences from `delta`, the sum of o * grad_o. Where they cancel (one token, equal
    values) there is nothing to be relative to: what o's rounding makes of delta is allowed then.
    """
    dtype = tensors[0].dtype
    plain = by_autograd(reference.attention_reference, case, tensors, dtype)
    truth = by_autograd(reference.attention_reference, case, tensors, torch.float64)
    q, k, _, grad = (x.double().abs() for x in tensors)
    lost = torch.finfo(dtype).eps * case.spec.scale * (truth[0].abs() * grad).sum(-1).amax()
    cancelled = {"q": lost * k.amax(), "k": lost * q.amax() * q.shape[1]}
    for name, mine, theirs, wanted in zip(("o", "q", "k", "v"), found, plain, truth, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == wanted.shape
        if name in "qk" and wanted.abs().amax() <= cancelled[name]:
            assert mine.abs().amax() <= cancelled[name], name
            continue
        allowed = slack or (1.0 if wanted.numel() < 4000 else 0.1)
        errors = (mine - wanted).abs(), (theirs - wanted).abs()
        if errors[0].amax() <= roundings * torch.finfo(dtype).eps / 2 * wanted.abs().amax():
            rms = [error.square().mean().sqrt().item() for error in errors]
            floor = 32 * 2.0**-23 * wanted.abs().amax().item()  # that of `excess_error`
            assert rms[0] <= (1 + allowed) * rms[1] + floor, name
        else:
            assert excess_error(mine, theirs, wanted, allowed) <= 1, name


def check_far(found: list[torch.Tensor], case: Case, tensors: list[torch.Tensor], roundings: int = 4) -> None:
    """No further from float64 than rounding of large scores explains, to first order.

    A score of size s is known to s * 2^-24 after each rounding; so far, relatively, is its weight p. With lse, and with
    the score that backward makes again, there are four. What follows of p in each result is summed without signs:
    gradients of q and k are sums that cancel, and what is left of them says nothing of their error.
    """
    q, k, v, grad = (x.double() for x in tensors)
    tokens, group = len(q), case.heads // case.key_heads
    segments = case.segments(q.device.type)
    each = torch.eye(tokens, dtype=q.dtype, device=q.device)[:, None].expand(-1, case.key_heads, -1)
    p = reference.attention_reference(q, k, each, segments, case.spec)  # [N, heads, N]
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->ihj", q, keys) * case.spec.scale
    lost = roundings * 2.0**-24 * scores[p > 0].abs().amax()
    dp = torch.einsum("ihd,jhd->ihj", grad, values)
    ds = p * (dp.abs() + (p * dp.abs()).sum(-1, keepdim=True))
    allowed = (
        torch.einsum("ihj,jhd->ihd", p, values.abs()),
        torch.einsum("ihj,jhd->ihd", ds, keys.abs()) * case.spec.scale,
        torch.einsum("ihj,ihd->jhd", ds, q.abs()).unflatten(1, (-1, group)).sum(2) * case.spec.scale,
        torch.einsum("ihj,ihd->jhd", p, grad.abs()).unflatten(1, (-1, group)).sum(2),
    )
    truth = by_autograd(reference.attention_reference, case, tensors, torch.float64)
    for name, mine, wanted, far in zip(("o", "q", "k", "v"), found, truth, allowed, strict=True):
        floor = 32 * 2.0**-23 * wanted.abs().amax()  # that of `excess_error`
        assert ((mine - wanted).abs() <= lost * far + floor).all(), name
