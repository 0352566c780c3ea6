"""What the ranks of one run found, put together, and how fast their collectives are; for `benchmarks.grpo_run`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import measure, scaling

#: Of these the largest rank's counts: each card must hold its own, and all wait for the slowest.
LARGEST = ("peak_gb", "loaded_gb", "torch_gb", "step_s", "rollout_s", "sync_ms", "logp_gap_largest", "logp_gap_last")
#: Large enough that a collective's time is its bandwidth.
LARGE_BYTES = 256 << 20


def together(result: dict[str, Any], model: Any) -> dict[str, Any]:
    """One result of all ranks; every rank calls it.

    Args:
        result: What this rank measured.
        model: Whose gradients are reduced.

    Returns:
        The largest of `LARGEST`, what follows from them, each rank's own in `ranks`, and what `benchmarks.scaling`
        needs: `collectives` and `gradient_bytes`.
    """
    world = dist.get_world_size()
    found: list[Any] = [None] * world
    dist.all_gather_object(found, {name: result[name] for name in (*LARGEST, "rollouts_s", "steps_s")})
    merged = {name: max((rank[name] for rank in found if rank[name] is not None), default=None) for name in LARGEST}
    merged["train_s"] = merged["step_s"] - merged["rollout_s"]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        **result,
        **merged,
        # Weak scaling: every rank samples as many as one does alone
        "tokens_s": world * result["tokens_s"] * result["rollout_s"] / merged["rollout_s"],
        "ranks": found,
        "world": world,
        "collectives": {"all_reduce": bus_speed(_all_reduce), "all_gather": bus_speed(_all_gather)},
        "gradient_bytes": sum(parameter.numel() * parameter.element_size() for parameter in trained),
    }


def bus_speed(collective: Callable[[torch.Tensor], float], rounds: int = 10) -> dict[str, float]:
    """Seconds that a collective takes on next to nothing, and bytes a second that each rank sends in a large one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def timed(nbytes: int) -> tuple[float, float]:
        x = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        moved = collective(x)
        return moved, statistics.median(measure.one_ms(lambda: collective(x)) for _ in range(rounds)) / 1e3

    _, latency_s = timed(4096)
    moved, seconds = timed(LARGE_BYTES)
    return {"latency_s": latency_s, "bytes_s": moved / seconds}


def _all_reduce(x: torch.Tensor) -> float:
    """Sum over all ranks; returns the bytes that each sends, as `benchmarks.scaling` counts them."""
    dist.all_reduce(x.view(torch.float32))
    return scaling.all_reduced(x.nbytes, dist.get_world_size())


def _all_gather(x: torch.Tensor) -> float:
    world = dist.get_world_size()
    whole = x[: len(x) // world * world]
    dist.all_gather_into_tensor(whole, torch.ones_like(whole[: len(whole) // world]))
    return scaling.gathered(whole.nbytes, world)
