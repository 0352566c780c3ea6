"""Trainings of a tiny model with the dashboard and the guards on: no hub, one thread, nothing patched in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import trl_turbo


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _unpatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("TRL_TURBO")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRL_TURBO_ROLLOUT", "0")  # sampling has tests of its own
    trl_turbo.unpatch()
    yield
    trl_turbo.unpatch()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Qwen2 and its tokenizer."""
    from trl_turbo.demo.tiny import make_model, make_tokenizer, save

    tokenizer = make_tokenizer()
    return save(tmp_path_factory.mktemp("tiny"), make_model(tokenizer, hidden_size=64), tokenizer)
