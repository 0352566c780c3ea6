"""Sequences in a paged cache, for the tests of paged attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trl_turbo.kernels.paged_attention import Rotation, Step


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    rotary: int = 16
    interleaved: bool = False
    window: int | None = None
    softcap: float = 0.0
    block: int = 16
    parts: int | None = None
    length: int | None = None
    spread: float = 1.0


@dataclass
class Made:
    """Arguments of `paged_decode` up to `slots`, and its keywords."""

    arguments: tuple[torch.Tensor, ...]
    keywords: dict[str, Any]
    lengths: tuple[int, ...]
    block: int

    def places(self, row: int) -> list[tuple[int, int]]:
        """Where a sequence's tokens are: block and place of each."""
        table = self.arguments[5][row].tolist()
        return [(table[i // self.block], i % self.block) for i in range(self.lengths[row])]

    @property
    def step(self) -> Step:
        """All of it."""
        return Step(*self.arguments, **self.keywords)

    def copied(self, dtype: torch.dtype) -> Made:
        """The same with caches of its own, in another dtype; integers stay."""
        arguments = tuple(x.to(dtype) if x.is_floating_point() else x for x in self.arguments)
        rotation = self.keywords["rotation"]
        if rotation is not None:
            rotation = rotation._replace(cos_sin=rotation.cos_sin.to(dtype))
        caches = tuple(x.clone() for x in arguments[3:5])
        return Made(
            (*arguments[:3], *caches, *arguments[5:]), self.keywords | {"rotation": rotation}, self.lengths, self.block
        )


def made(case: Case, dtype: torch.dtype, device: str) -> Made:
    """Random tensors; queries, keys and values lie in one row as a joined product leaves them, blocks anywhere."""
    generator = torch.Generator().manual_seed(sum(case.lengths) + case.heads)
    rows, longest = len(case.lengths), max(1, *case.lengths)

    def normal(*shape: int) -> torch.Tensor:
        return (case.spread * torch.randn(*shape, generator=generator)).to(device, dtype)

    joined = normal(rows, case.heads + 2 * case.kv_heads, case.dim)
    query, key, value = joined.split([case.heads, case.kv_heads, case.kv_heads], dim=1)
    each = -(-longest // case.block)
    # As vLLM lays a cache out: keys and values of a head side by side
    cache = normal(rows * each + 1, case.kv_heads, case.block, 2 * case.dim)
    key_cache, value_cache = cache.transpose(1, 2).split(case.dim, dim=-1)
    table = torch.randperm(rows * each, generator=generator).view(rows, each).int().to(device)
    last = torch.tensor([max(n - 1, 0) for n in case.lengths])
    slots = table.cpu()[torch.arange(rows), last // case.block].long() * case.block + last % case.block
    slots[torch.tensor(case.lengths) == 0] = -1
    lens = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    rotation = None
    if case.rotary:
        angles = torch.arange(longest + 3)[:, None] / 10.0 ** torch.linspace(0, 3, case.rotary // 2)
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device, dtype)
        rotation = Rotation(cos_sin, last.to(device), case.interleaved)
    keywords = {
        "scale": case.dim**-0.5,
        "rotation": rotation,
        "window": case.window,
        "softcap": case.softcap,
    }
    arguments = (query, key, value, key_cache, value_cache, table, lens, slots.to(device))
    return Made(arguments, keywords, case.lengths, case.block)
