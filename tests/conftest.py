"""For every test: no hub, nothing printed that is not asked for, and quick collections of garbage."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    TRL_EXPERIMENTAL_SILENCE="1",
)


@pytest.fixture(scope="session", autouse=True)
def _quick_collections() -> Iterator[None]:
    # accelerate and vLLM collect garbage in every run, which takes ten times the run itself while torch's modules are
    # searched; those that tests import have been imported by now
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
