"""A vLLM with base weights of its own, into which a sync puts the trainer's adapter alone.

For trainers whose tensors vLLM cannot read in place because of parallelism: those that FSDP2 or ZeRO shard, and those
that hold whole tensors where vLLM holds the shards of a tensor parallel group. TRL merges the adapter into the gathered
model there and copies every weight; here vLLM reads its base from the checkpoint once, as TRL has it do, and after each
optimizer step the adapter goes from memory into its buffers, a rank's own part of it. From there it is folded into the
base, as where weights are shared, and taken out again to the bit before the next one comes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trl_turbo.engine import abilities, adapter, options, parity, sizing
from trl_turbo.engine.adapter import ServedAdapter
from trl_turbo.engine.adapter_config import active_adapter, adapter_declined, adapter_layers
from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.engine.gather import assembled
from trl_turbo.engine.merged import Fold, LogTooLargeError
from trl_turbo.engine.names import base_model, base_weights
from trl_turbo.engine.serving import Trainee
from trl_turbo.engine.together import agreed
from trl_turbo.report import logger, note

_MIB = 1 << 20


class ServedEngine:
    """The state behind a `TurboLLM` that has its own base weights and the trainer's adapter.

    Args:
        trainee: Whom it serves.
        worker: vLLM's worker in this process.
        reason: Why it shares no weights, in a sentence.

    Attributes:
        adapter: The adapter in vLLM's buffers.
        fold: The adapter's way into vLLM's base weights, where it is folded into them, or `None`.
        weights_asleep: Whether vLLM's weights are out of the device's memory at the moment.

    Raises:
        EngineDeclinedError: vLLM has no place for the adapter.
    """

    def __init__(self, trainee: Trainee, worker: Any, reason: str) -> None:
        self._trainee = trainee
        self._base = base_model(trainee.model)
        self._worker = worker
        self._reason = reason
        self.weights_asleep = False
        self.fold: Fold | None = None
        self._serve()

    def _serve(self) -> None:
        name = active_adapter(self._base)
        layers = adapter_layers(self._base, name) if name is not None else {}
        self.adapter = ServedAdapter(self._base, self._worker.model_runner.lora_manager)
        self.adapter.push()
        merges, self._applied = options.merges(self._worker.model_config.dtype)
        if merges:
            obstacle = agreed(self.adapter.unfoldable)
            if obstacle is None:
                self.fold = Fold(self.adapter.layers)
                self._fold()
            else:
                self._applied = f"the adapter is served unmerged: {obstacle}"
        self._followed = (name, tuple(layers.values()))

    def _fold(self) -> None:
        """Fold the adapter on all ranks, or on none: those of one vLLM must ask it for the same."""
        if self.fold is None:
            return
        reason = None
        try:
            self.fold.fold()
        except LogTooLargeError as error:
            reason = str(error)
        reason = agreed(reason)
        if reason is not None:
            self.fold.restore()
            self.fold = None
            self._applied = f"the adapter is served unmerged from now on: {reason}"
            note("rollout", self._applied)

    @contextmanager
    def adapted(self) -> Iterator[Any]:
        """While open, vLLM samples with the adapter; yields what requests must carry for that, `None` for nothing."""
        yield None if self.fold is not None and self.fold.folded else self.adapter.request

    def check(self) -> int:
        """Nothing can move that vLLM reads: always 0."""
        return 0

    def refresh(self) -> None:
        """Push the adapter as it is now. Every rank must call it: shards are gathered.

        Raises:
            EngineDeclinedError: The adapter was merged, removed or replaced by one that cannot be served.
        """
        name = active_adapter(self._base)
        if name is None:
            raise EngineDeclinedError(
                "the adapter that vLLM serves was merged, disabled or removed since the engine started, and vLLM's own "
                "base weights do not have it; keep the adapter until training ends, or build the trainer anew"
            )
        if self.fold is not None:
            self.fold.restore()  # while its buffers are what was folded
        before, kept = self._followed
        layers = adapter_layers(self._base, name)
        if name == before and len(kept) == len(layers) and all(map(operator.is_, kept, layers.values())):
            self.adapter.push()
            self._fold()
            return
        declined = adapter_declined(self._base)
        if declined is not None:
            raise EngineDeclinedError(declined)
        self.fold = None
        self._serve()

    def compare(self, sample: Callable[[list[int], int], tuple[list[int], list[float]]]) -> str | None:
        """Say why vLLM's base weights are not the trainer's, as log-probs of one sampled answer tell, or return `None`.

        Every rank must call it, and one's reason is everybody's: which way weights are synced is the same on all.
        """
        prompt = parity.probe_prompt(self._worker.model_config.get_vocab_size())
        ids, logprobs = sample(prompt, parity.SAMPLED_TOKENS)
        return agreed(self._differs(prompt, ids, logprobs) if _has_weights(self._trainee.accelerator) else None)

    def _differs(self, prompt: list[int], ids: list[int], logprobs: list[float]) -> str | None:
        model = self._trainee.model
        try:
            with assembled(model), _attention_where_it_is(self._base):
                dtype = self._worker.model_config.dtype
                return parity.gap(model, prompt, ids, logprobs, dtype, in_step=True).reason
        except Exception as error:
            # A reason like another: the other ranks wait for this one's answer
            logger.debug("the trainer's model could not be asked", exc_info=True)
            return f"the trainer's model could not be asked for its log-probs ({type(error).__name__}: {error})"

    @property
    def way(self) -> str:
        """How weights get to vLLM, and why so, in a sentence."""
        return (
            f"{self._reason}; vLLM has a base of its own, read once from the checkpoint, and each sync puts the "
            f"adapter alone into its buffers ({self.adapter.nbytes / _MIB:.3g} MiB on this device), from memory; "
            f"{self._applied}"
        )


def llm_kwargs(trainee: Trainee, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `vllm.LLM`: those of TRL's, room for the adapter, and how an engine that shares decodes.

    Args:
        trainee: Whom the engine serves.
        given: What TRL passes to `LLM`.

    Raises:
        EngineDeclinedError: The adapter's rank is larger than vLLM's buffers.
    """
    kwargs = {name: value for name, value in given.items() if value is not None}
    kwargs |= adapter.llm_kwargs(trainee.model)
    on_gpu = torch.cuda.is_available()
    dtypes = {slot.parameter.dtype for slot in base_weights(trainee.model).values()}
    # A trainer's float32 weights of a 16-bit checkpoint stay for vLLM to read as TRL has it do: in the checkpoint's
    if len(dtypes) == 1 and (not on_gpu or next(iter(dtypes)).itemsize == 2):
        kwargs.setdefault("dtype", str(next(iter(dtypes))).removeprefix("torch."))
    if not on_gpu:
        # As for an engine that shares: see `start`
        kwargs |= {"enable_sleep_mode": False, "enforce_eager": given.get("enforce_eager") is not False}
    elif not given.get("enforce_eager") and not given.get("compilation_config"):
        sequences = kwargs.get("max_num_seqs") or trainee.work.sequences * (given.get("tensor_parallel_size") or 1)
        # For batches with and without the adapter: it may have to be served
        kwargs["compilation_config"] = abilities.compilation(sizing.graphs_of(sequences, adapter=False))
    bursts, slower = options.bursts(kwargs, on_gpu=on_gpu, shared=False)
    if slower:
        note("rollout", slower)
    return kwargs | bursts


@contextmanager
def _attention_where_it_is(base: Any) -> Iterator[None]:
    """While open, a model that waits on the CPU to be sharded attends by a way that works there."""
    chosen = base.config._attn_implementation
    on_cpu = next(base.parameters()).device.type == "cpu" and torch.cuda.is_available()
    if not on_cpu or chosen in ("eager", "sdpa"):
        yield
        return
    base.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        base.config._attn_implementation = chosen


def _has_weights(accelerator: Any) -> bool:
    """Whether this rank has read the model: with FSDP's memory-saving loading, one on each host does."""
    plugin = getattr(getattr(accelerator, "state", None), "fsdp_plugin", None)
    return not getattr(plugin, "cpu_ram_efficient_loading", False) or bool(accelerator.is_local_main_process)
