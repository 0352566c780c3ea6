"""Whole trainings of tiny models: no hub, one thread, and nothing patched before or after a test."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest

import trl_turbo

from .models import PACKED


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _unpatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("TRL_TURBO")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRL_TURBO_ROLLOUT", "0")  # sampling has tests of its own, and these give completions or a seed
    # They compute nothing, and a report a training takes longer than the training: tests/people is about them
    monkeypatch.setenv("TRL_TURBO_DASHBOARD", "0")
    monkeypatch.setenv("TRL_TURBO_GUARDS", "0")
    if not PACKED:  # the padded batches of a model that does not qualify for packed rows
        monkeypatch.setenv("TRL_TURBO_PACKING", "0")
        monkeypatch.setenv("TRL_TURBO_ATTENTION", "0")
    trl_turbo.unpatch()
    from .runs import forget_precision

    forget_precision()  # an Accelerator of the test's own would take the last trainer's autocast over
    yield
    trl_turbo.unpatch()
