"""What is allocated starts as NaN, so that an element that nobody writes shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """Let `torch.empty` and `torch.empty_like` give NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def filled(make):
        def make_filled(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return make_filled

    with mock.patch.object(torch, "empty", filled(empty)), mock.patch.object(torch, "empty_like", filled(empty_like)):
        yield
