"""Decode several tokens for each pass through vLLM's scheduler.

A decode step of a small model is short on the GPU, and the Python around it may take longer: with 8 sequences of a
1.5B model on an H200, a step took 3.0 ms one by one and 2.4 in bursts on a slow host, 2.37 and 2.34 on a
fast one. Scheduling, bookkeeping and output handling need no token's value while every sequence just goes on, so they
are done once for a burst of steps, whose tokens stay on the device in between. To the scheduler a burst looks as a step
of speculative decoding does whose drafts were all accepted, a case that it, its bookkeeping and its output processing
know: each request gets several tokens at once, and those after a stop are dropped.

The schedulers here are for `scheduler_cls`, `Executes` for a worker class; vLLM offers both as places for one's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsLists, ModelRunnerOutput

#: Tokens of a burst. A sequence that stops inside one decodes its rest in vain, 8 tokens on average, and so does the
#: whole batch after its last sequence has stopped; longer ones save little more of what is once a burst.
TOKENS = 16
#: The same while requests wait for a place, which a sequence that stops leaves empty until the burst ends.
TOKENS_WITH_QUEUE = 4


@dataclass
class Burst(SchedulerOutput):
    """What is scheduled for several steps: `num_scheduled_tokens` counts all of them.

    Attributes:
        tokens: Steps, each of one token for each request.
    """

    tokens: int = 1

    def steps(self) -> Iterator[SchedulerOutput]:
        """Yield what each step would have been scheduled as."""
        each = dict.fromkeys(self.num_scheduled_tokens, 1)
        whole = _whole(self)
        first = SchedulerOutput(**{**whole, "num_scheduled_tokens": each, "total_num_scheduled_tokens": len(each)})
        yield first
        # What happens once happens in the first: requests that ended, blocks that are new
        once: dict[str, Any] = {"finished_req_ids": set(), "free_encoder_mm_hashes": []}
        for name in ("preempted_req_ids", "new_block_ids_to_zero", "kv_cache_block_copies"):
            if name in whole:
                once[name] = None
        cached = self.scheduled_cached_reqs
        for step in range(1, self.tokens):
            yield replace(first, scheduled_cached_reqs=_later(cached, step), **once)


def _whole(output: SchedulerOutput) -> dict[str, Any]:
    """vLLM's fields of what it scheduled, which may be more in another version."""
    return {f.name: getattr(output, f.name) for f in fields(SchedulerOutput)}


def _later(cached: CachedRequestData, step: int) -> CachedRequestData:
    return replace(
        cached,
        resumed_req_ids=set(),
        all_token_ids={},
        new_block_ids=[None] * len(cached.req_ids),
        num_computed_tokens=[n + step for n in cached.num_computed_tokens],
        num_output_tokens=[n + step for n in cached.num_output_tokens],
    )


class _Schedules:
    """A scheduler of vLLM's that hands out bursts while all that runs is decoding."""

    def schedule(self: Any, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """As vLLM's; a step that is pure decoding becomes a burst."""
        tokens = self._burst_tokens()
        lookahead = self.num_lookahead_tokens
        self.num_lookahead_tokens = lookahead + tokens - 1  # blocks for all of them, allocated by vLLM's own code
        try:
            output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.num_lookahead_tokens = lookahead
        return self._extended(output, tokens) if tokens > 1 and self._decodes(output) else output

    def _burst_tokens(self: Any) -> int:
        """How many steps may follow each other without a look at what was sampled."""
        if not self.running or self.num_spec_tokens or getattr(self, "need_mamba_block_aligned_split", False):
            return 1
        if self.connector is not None or not all(map(_needs_no_look, self.running)):
            return 1
        wanted = TOKENS_WITH_QUEUE if self.waiting else TOKENS
        left = max(r.num_prompt_tokens + r.max_tokens - r.num_tokens - r.num_output_placeholders for r in self.running)
        room = min(self.max_model_len - r.num_computed_tokens for r in self.running) - 1
        return max(1, min(wanted, left, room))

    def _decodes(self: Any, output: SchedulerOutput) -> bool:
        counts = output.num_scheduled_tokens
        if not counts or output.scheduled_new_reqs or output.scheduled_cached_reqs.resumed_req_ids:
            return False
        return all(n == 1 and not self.requests[i].is_prefill_chunk for i, n in counts.items())

    def _extended(self: Any, output: SchedulerOutput, tokens: int) -> Burst:
        placeholders = isinstance(self, AsyncScheduler)
        for name in output.num_scheduled_tokens:
            request = self.requests[name]
            request.num_computed_tokens += tokens - 1
            request.num_in_flight_tokens += tokens - 1
            if placeholders:
                request.num_output_placeholders += tokens - 1
        counts = dict.fromkeys(output.num_scheduled_tokens, tokens)
        for_all = {"num_scheduled_tokens": counts, "total_num_scheduled_tokens": tokens * len(counts)}
        return Burst(**(_whole(output) | for_all), tokens=tokens)


def _needs_no_look(request: Any) -> bool:
    """Whether what is sampled for a request decides nothing until the burst ends.

    A grammar's mask depends on the last token; a stop string is found in text, which may end inside a burst, and the
    token ids after it would stay in the result.
    """
    params = request.sampling_params
    return params is not None and not request.use_structured_output and not params.stop


class BurstScheduler(_Schedules, Scheduler):
    """For engines that wait for each step: vLLM's on a CPU."""


class AsyncBurstScheduler(_Schedules, AsyncScheduler):
    """For engines that schedule the next step while the last one runs: vLLM's on a GPU."""


class Executes:
    """A worker of vLLM's that takes bursts; goes before the worker's class."""

    _whole: Any = None
    _before: tuple[Any, ...] = ()

    def lean_steps(self) -> Any:
        """A :class:`trl_turbo.engine.lean.LeanSteps` for this worker's runner, or `None`."""
        return None

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run the model; of a burst, all but the last step's sampling."""
        run = super().execute_model  # type: ignore[misc]
        if not isinstance(scheduler_output, Burst):
            return run(scheduler_output)
        steps = scheduler_output.steps()
        first, lean = next(steps), self.lean_steps()
        if lean is None:
            run(first)
        else:
            self._whole = lean.run(lambda: run(first), scheduler_output.tokens)
            if self._whole is not None:
                return None
        outputs = []
        for step in steps:
            outputs.append(super().sample_tokens(None))  # type: ignore[misc]
            run(step)
        self._before = tuple(outputs)
        return None

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample what :meth:`execute_model` ran, and give a burst's tokens back together."""
        whole, self._whole = self._whole, None
        if whole is not None:
            return whole
        before, self._before = self._before, ()
        last = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if not before:
            return last
        together = _Together((*before, last))
        return together if isinstance(last, AsyncModelRunnerOutput) else together.get_output()


class _Together(AsyncModelRunnerOutput):
    """The outputs of a burst's steps, in order, as one."""

    def __init__(self, outputs: Sequence[Any]) -> None:
        self._outputs = outputs

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the last step; see vLLM's."""
        steps = [o.get_output() if isinstance(o, AsyncModelRunnerOutput) else o for o in self._outputs]
        first, last = steps[0], steps[-1]
        # [steps, requests, 1] to [requests, steps]
        by_request = zip(*(s.sampled_token_ids for s in steps), strict=True)
        tokens = [[ids[0] for ids in one] for one in by_request]
        logprobs = _joined([s.logprobs for s in steps]) if last.logprobs is not None else None
        if any(s.req_ids != first.req_ids for s in steps):
            raise RuntimeError("vLLM reordered its batch inside a burst; call patch(rollout_burst='off') and report it")
        return replace(last, sampled_token_ids=tokens, logprobs=logprobs)


def _joined(steps: Sequence[LogprobsLists]) -> LogprobsLists:
    """Log-probs of all steps, those of a request one after the other: [requests * steps, ...]."""
    count, requests = len(steps), len(steps[0].sampled_token_ranks)

    def join(name: str) -> np.ndarray:
        stacked = np.stack([getattr(s, name) for s in steps], axis=1)  # [requests, steps, ...]
        return stacked.reshape(requests * count, *stacked.shape[2:])

    starts = [count * i for i in range(requests + 1)]
    return LogprobsLists(join("logprob_token_ids"), join("logprobs"), join("sampled_token_ranks"), starts)
