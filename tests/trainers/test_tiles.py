"""A gated MLP a tile of rows at a time: the same numbers row by row, a tile's memory, and no product more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trl_turbo.patches.checkpointing.tiles import _spans, tiled

H, INNER, ROWS = 8, 24, 128


class Mlp(nn.Module):
    """With a frozen linear, two trained ones and a count of the rows that pass through."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(H, INNER), nn.Linear(H, INNER), nn.Linear(INNER, H)
        self.up.requires_grad_(False)
        self.to(dtype)
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(x.shape[:-1].numel())
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def run(mlp: Mlp, function: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of what is trained."""
    x = x.clone().requires_grad_()
    y = function(x)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in mlp.parameters() if p.requires_grad)]
    mlp.zero_grad(set_to_none=True)
    return found


def in_tiles(mlp: Mlp) -> Any:
    return lambda x: tiled(mlp, x, tuple(mlp.parameters()), ROWS)


@pytest.mark.parametrize("shape", [(2, 300), (1, 129), (640,), (3, 2, 100), (1, 1)])
def test_same_as_whole(shape: tuple[int, ...]) -> None:
    mlp, x = Mlp(), torch.randn(*shape, H, dtype=torch.float64)
    for ours, whole in zip(run(mlp, in_tiles(mlp), x), run(mlp, mlp, x), strict=True):
        # The sum over rows is one over tiles of sums: as far apart as two orders of adding in float64 may be
        torch.testing.assert_close(ours, whole, rtol=0, atol=x.shape[:-1].numel() * 2**-52 * whole.abs().max().item())
    assert max(mlp.rows[:-1]) <= ROWS


def test_gradients_of_parameters_are_summed_in_float32() -> None:
    """In bf16, a sum that is rounded with each of 40 tiles is further off than one that is rounded once."""
    mlp, exact = Mlp(torch.bfloat16), Mlp(torch.float64)
    exact.load_state_dict({k: v.double() for k, v in mlp.state_dict().items()})
    x = torch.randn(40 * ROWS, H).bfloat16()
    ours, whole, truth = run(mlp, in_tiles(mlp), x), run(mlp, mlp, x), run(exact, exact, x.double())
    for mine, theirs, true in zip(ours[2:], whole[2:], truth[2:], strict=True):
        own = (theirs.double() - true).norm()
        assert (mine.double() - true).norm() <= 1.1 * own + 2**-9 * true.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_runs_each_row_twice(reentrant: bool) -> None:
    """Plain checkpointing does too. Reentrant, torch runs the layer to its end again: once more."""
    mlp, x = Mlp(), torch.randn(1, 4 * ROWS, H, dtype=torch.float64)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x + in_tiles(mlp)(x.sin())

    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer, x, use_reentrant=reentrant)

    whole = run(mlp, lambda x: x + mlp(x.sin()), x)
    mlp.rows.clear()
    ours = run(mlp, checkpointed, x)
    assert sum(mlp.rows) == (3 if reentrant else 2) * 4 * ROWS
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * ROWS * 2**-52 * b.abs().max().item())


def test_inside_exists_for_one_tile() -> None:
    """What autograd saves at a time is that of a tile."""
    mlp, x = Mlp(), torch.randn(8 * ROWS, H, dtype=torch.float64)
    widest = 0

    def pack(saved: torch.Tensor) -> torch.Tensor:
        nonlocal widest
        if saved.dim() > 1 and saved.shape[-1] == INNER:
            widest = max(widest, saved.shape[:-1].numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        run(mlp, in_tiles(mlp), x)
    assert widest <= ROWS
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        run(mlp, mlp, x)
    assert widest == 8 * ROWS


def test_autocast_is_entered_again() -> None:
    mlp, x = Mlp(torch.float32), torch.randn(3 * ROWS, H)

    def cast(function: Any) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(x)

        return call

    ours, whole = run(mlp, cast(in_tiles(mlp)), x), run(mlp, cast(mlp), x)
    assert ours[0].dtype == whole[0].dtype == torch.bfloat16
    for a, b in zip(ours, whole, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=3 * 2**-8 * b.abs().max().item())


def test_no_gradient_no_graph() -> None:
    mlp, x = Mlp(), torch.randn(3 * ROWS, H, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(in_tiles(mlp)(x), mlp(x), rtol=0, atol=1e-14)
    mlp.requires_grad_(False)
    assert not in_tiles(mlp)(x).requires_grad


@pytest.mark.parametrize("count", [1, 127, 128, 129, 1000, 8193])
def test_spans_cover_all_rows_in_pieces_alike(count: int) -> None:
    spans = list(_spans(count, 512))
    assert [row for span in spans for row in range(*span)] == list(range(count))
    assert max(end - start for start, end in spans) <= 512
    assert len(spans) == -(-count // 512)
