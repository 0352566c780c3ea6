"""Jobs of torchrun's own agent whose ranks are forked from a process that has imported TRL, which takes longest."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> dict[int, Any]:
    """Call a function in so many processes, as `torchrun --nproc-per-node N` starts a script; one as `python` does.

    Not again in the same job, as `--max-restarts` does: with gloo, ranks of torch 2.13 then look for each other at the
    addresses of those that died, and now and then wait there for half an hour.

    Args:
        count: How many.
        function: What each rank does.
        args: For it.

    Returns:
        What it returned, by rank.

    Raises:
        ChildFailedError: A rank failed.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    return elastic_launch(config, _started)(function, *args)


def _started(function: Callable[..., Any], *args: Any) -> Any:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a script's; forked, it is the agent's
    if os.environ["WORLD_SIZE"] == "1":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    return function(*args)
