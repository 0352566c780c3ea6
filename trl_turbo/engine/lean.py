"""The further steps of a burst on vLLM's GPU runner: the same kernels, without what prepares them anew.

From the second step of a burst on, the batch is that of the step before with one token more. vLLM's `execute_model`
would sort it, copy it to the device, write its states and look up its graph again. Everything that differs is on the
device already: the tokens that were sampled and how many were computed. So only the kernels that read those are
launched, vLLM's own but for the log-prob, and the tokens of all steps come to the host once: 0.8 to 1.5 ms of Python a
step on two H200 hosts, where the GPU needs 2.3.

Follows `GPUModelRunner.execute_model` and `sample_tokens` of `vllm.v1.worker.gpu.model_runner` (0.26); `unfit` says
where a runner is not as expected, and bursts then run through those two.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from trl_turbo.kernels.token_logprob import token_logprob

_RUNNER = "vllm.v1.worker.gpu.model_runner"
#: What is called here, with its parameters in vLLM 0.26.
_EXPECTED: dict[str, tuple[str, ...]] = {
    "prepare_pos_seq_lens": ("idx_mapping", "query_start_loc", "num_computed_tokens", "pos", "seq_lens"),
    "combine_sampled_and_draft_tokens": (
        "input_ids",
        "idx_mapping",
        "last_sampled_tokens",
        "query_start_loc",
        "seq_lens",
        "prefill_len",
        "draft_tokens",
        "cu_num_logits",
        "num_logits",
        "num_new_sampled_tokens",
    ),
    "AsyncOutput": ("model_runner_output", "sampler_output", "num_sampled_tokens", "main_stream", "copy_stream"),
}
_METHODS: dict[str, tuple[str, ...]] = {
    "sample": ("hidden_states", "input_batch", "grammar_output"),
    "postprocess_sampled": ("idx_mapping", "sampled_tokens", "num_sampled", "num_rejected", "query_start_loc"),
}
_SAMPLER = (
    "logits",
    "expanded_idx_mapping",
    "idx_mapping_np",
    "pos",
    "input_ids",
    "expanded_local_pos",
    "return_logprobs",
)


def unfit(runner: Any) -> str | None:
    """Say why a runner's further steps cannot be run here, or return `None`."""
    kind = type(runner)
    if kind.__module__ != _RUNNER:
        return f"{kind.__module__}.{kind.__qualname__} is not vLLM's second GPU runner"
    for owner, names in ((inspect.getmodule(kind), _EXPECTED), (kind, _METHODS)):
        for name, wanted in names.items():
            reason = _misfit(owner, name, wanted)
            if reason is not None:
                return reason
    state = runner.model_state
    if type(state).__name__ != "DefaultModelState" or getattr(state, "rope_state", None) is not None:
        return f"the model keeps a state beside its cache ({type(state).__name__})"
    for name in ("pp_handler", "pcp_manager", "speculator", "rejection_sampler"):
        if getattr(runner, name, None) is not None:
            return f"the runner has a {name}"
    if runner.use_dcp or runner.supports_mm_inputs or runner.model_config.rswa_window is not None:
        return "the runner prepares more than tokens and positions"
    return None


def _misfit(owner: Any, name: str, wanted: tuple[str, ...]) -> str | None:
    """Say why `owner.name` cannot be called with these arguments, or return `None`."""
    found = getattr(owner, name, None)
    if found is None:
        return f"{owner.__name__} has no {name}"
    given = {p.name: p for p in inspect.signature(found).parameters.values() if p.name != "self"}
    needed = [p.name for p in given.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    unknown = [n for n in wanted if n not in given] + [n for n in needed if n not in wanted]
    return f"{name} takes {tuple(given)}, and {unknown[0]} is not as expected" if unknown else None


class LeanSteps:
    """Runs bursts on a runner.

    Args:
        runner: vLLM's `GPUModelRunner`, for which :func:`unfit` found nothing.
        own_attention: Sizes of batches whose graph has no attention of vLLM's, for which nothing is prepared then.
    """

    def __init__(self, runner: Any, own_attention: Set[int] = frozenset()) -> None:
        self._runner = runner
        self._own_attention = own_attention
        self._kernels: Any = inspect.getmodule(type(runner))
        self._graph: Any = None
        manager = runner.cudagraph_manager
        replay = manager.run_fullgraph

        def noted(desc: Any) -> Any:
            self._graph = desc
            return replay(desc)

        self._own_logprobs = _misfit(type(runner.sampler), "sample", _SAMPLER) is None
        manager.run_fullgraph = noted  # on the instance: which graph a step took is kept nowhere else
        self._replay = replay

    @torch.inference_mode()
    def run(self, first: Callable[[], Any], tokens: int) -> Any:
        """Run the burst's first step with `first`, vLLM's own, and then the others.

        Returns:
            What `sample_tokens` gives back, for all tokens; `None` where the first step took no full CUDA graph: it is
            run then, and not sampled.
        """
        self._graph = None
        first()
        if self._graph is None:
            return None
        runner, graph = self._runner, self._graph
        state, runner.execute_model_state = runner.execute_model_state, None
        batch, hidden = state.input_batch, state.hidden_states
        sampled = []
        one = torch.ones(batch.num_reqs, dtype=torch.int32, device=hidden.device)
        counts = one, torch.zeros_like(one)  # sampled and rejected, of each request in each step
        with _at_hand(runner.sampler):
            for step in range(tokens):
                if step:
                    self._advance(batch)
                    hidden = self._replay(graph)
                output = self._sample(hidden, batch, counts)
                runner.postprocess_sampled(
                    batch.idx_mapping,
                    output.sampled_token_ids,
                    output.num_sampled,
                    output.num_rejected,
                    batch.query_start_loc,
                )
                sampled.append(output)
        return self._output(batch, sampled)

    def _sample(self, hidden: Any, batch: Any, counts: tuple[torch.Tensor, torch.Tensor]) -> Any:
        """As the runner's `sample`; the log-prob of nothing but the sampled token comes from our kernel.

        vLLM's have one program a row, of which a decode batch has few: 0.14 ms of a step of 2.3 ms on one H200, with 8
        sequences and 151,936 tokens.
        """
        runner, sampler = self._runner, self._runner.sampler
        if not self._own_logprobs:
            return runner.sample(hidden, batch, None)[0]
        wanted = sampler.sampling_states.max_num_logprobs(batch.idx_mapping_np)
        others = sampler.logprob_token_ids_state.max_num_token_ids(batch.idx_mapping_np)
        if wanted > 0 or others or sampler.compute_nans or sampler.logprobs_mode != "processed_logprobs":
            return runner.sample(hidden, batch, None)[0]
        rows = batch.num_reqs  # each with one token, so that `logits_indices` counts them
        tokens, processed = sampler.sample(
            runner.model.compute_logits(hidden[:rows]),
            batch.expanded_idx_mapping,
            batch.idx_mapping_np,
            batch.positions[:rows],
            batch.input_ids[:rows],
            batch.expanded_local_pos,
            return_logprobs=wanted == 0,
        )
        one, none = counts
        return SamplerOutput(
            sampled_token_ids=tokens.view(-1, 1),
            logprobs_tensors=_logprobs(processed, tokens) if wanted == 0 else None,
            num_nans=None,
            num_sampled=one,
            num_rejected=none,
        )

    def _advance(self, batch: Any) -> None:
        """Make the graph's inputs those of the next token."""
        runner, kernels = self._runner, self._kernels
        states, buffers = runner.req_states, runner.input_buffers
        kernels.prepare_pos_seq_lens(
            batch.idx_mapping,
            batch.query_start_loc,
            states.num_computed_tokens.gpu,
            buffers.positions,
            buffers.seq_lens,
        )
        kernels.combine_sampled_and_draft_tokens(
            buffers.input_ids,
            batch.idx_mapping,
            states.last_sampled_tokens,
            batch.query_start_loc,
            batch.seq_lens,
            states.prefill_len.gpu,
            states.draft_tokens,
            batch.cu_num_logits,
            batch.num_reqs,
            runner.model_state.num_new_sampled_tokens_per_step,
        )
        slots = runner.block_tables.compute_slot_mappings(
            batch.idx_mapping, batch.query_start_loc, batch.positions, num_tokens_padded=batch.num_tokens_after_padding
        )
        batch.seq_lens_cpu_upper_bound[: batch.num_reqs] += 1
        if self._graph.num_tokens in self._own_attention:
            return
        # What it returns the graph has already; for FlashAttention 3 it writes the split of the work for these lengths
        runner.model_state.prepare_attn(
            batch,
            self._graph.cg_mode,
            runner.block_tables.get_dummy_block_tables(batch.num_reqs_after_padding),
            slots,
            runner.attn_groups,
            runner.kv_cache_config,
        )

    def _output(self, batch: Any, sampled: list[Any]) -> Any:
        runner, tokens, last = self._runner, len(sampled), sampled[-1]
        logprobs = _joined([o.logprobs_tensors for o in sampled]) if last.logprobs_tensors is not None else None
        together = SamplerOutput(
            sampled_token_ids=torch.cat([o.sampled_token_ids for o in sampled], dim=1),  # [requests, steps]
            logprobs_tensors=logprobs,
            num_nans=last.num_nans,
            num_sampled=torch.full_like(last.num_sampled, tokens),
            num_rejected=last.num_rejected,
        )
        output = ModelRunnerOutput(
            req_ids=batch.req_ids,
            req_id_to_index={name: i for i, name in enumerate(batch.req_ids)},
            sampled_token_ids=None,
        )
        return self._kernels.AsyncOutput(
            model_runner_output=output,
            sampler_output=together,
            num_sampled_tokens=together.num_sampled,
            main_stream=runner.main_stream,
            copy_stream=runner.output_copy_stream,
        )


@contextmanager
def _at_hand(sampler: Any) -> Iterator[None]:
    """Keep what vLLM leaves in the host's memory for the sampler in the device's: it stays as it is within a burst.

    Each of the 1,192 programs that sample 8 of 151,936 tokens reads a temperature and a seed across the bus.
    """
    with ExitStack() as stack:
        for name in ("temperature", "seeds"):
            kept = getattr(getattr(sampler, "sampling_states", None), name, None)
            there = getattr(kept, "gpu", None)
            if kept is not None and isinstance(there, torch.Tensor):
                kept.gpu = there.clone()
                stack.callback(setattr, kept, "gpu", there)
        yield


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> LogprobsTensors:
    logps, ranks = token_logprob(logits, tokens)
    return LogprobsTensors(tokens.unsqueeze(-1), logps.unsqueeze(-1), ranks)


def _joined(steps: list[LogprobsTensors]) -> LogprobsTensors:
    """Log-probs of all steps, those of a request one after the other: [requests * steps, ...]."""
    count, requests = len(steps), steps[0].selected_token_ranks.shape[0]

    def join(name: str) -> torch.Tensor:
        return torch.stack([getattr(s, name) for s in steps], dim=1).flatten(0, 1)

    starts = [count * i for i in range(requests + 1)]
    return LogprobsTensors(join("logprob_token_ids"), join("logprobs"), join("selected_token_ranks"), starts)
