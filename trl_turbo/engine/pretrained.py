"""A checkpoint in one copy: vLLM reads it, and transformers' model is given the same tensors."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trl_turbo.engine.checks import declined
from trl_turbo.engine.errors import EngineDeclinedError
from trl_turbo.engine.names import base_weights
from trl_turbo.engine.serving import Trainee, alone, serving
from trl_turbo.engine.sizing import Work
from trl_turbo.engine.start import vllm_device

#: Sequences at a time, and their length, that an engine is sized for where the caller says nothing.
SEQUENCES = 64
TOKENS = 2048
#: What both `from_pretrained` and vLLM know, under transformers' name, with vLLM's.
_SOURCE = {
    "revision": "revision",
    "code_revision": "code_revision",
    "trust_remote_code": "trust_remote_code",
    "token": "hf_token",
    "cache_dir": "download_dir",
    "local_files_only": None,
}
_MODEL = ("attn_implementation",)


@dataclass(frozen=True)
class Engine:
    """How the engine of one model is started.

    Attributes:
        name: Name or folder of the checkpoint.
        max_lora_rank: Rank to make room for; 0 for none.
        llm_kwargs: Arguments for `vllm.LLM`; `None` counts as not given.
    """

    name: str
    max_lora_rank: int
    llm_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def start(self, model: Any, *, empty: bool = False) -> Any:
        """Start it; the model's `fast_generate` has it then.

        Args:
            model: A transformers model, wrapped by PEFT or not.
            empty: Whether its parameters have no values yet.

        Raises:
            ImportError: vLLM is not installed.
            EngineDeclinedError: The model cannot be served from one copy of its weights.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ImportError("fast_generate needs vLLM, which is not installed; pip install 'trl-turbo[vllm]'")
        gc.collect()  # an engine of a dead model, collected after this start, would end the new one's process groups
        from trl_turbo.engine.llm import TurboLLM

        given = {
            "model": self.name,
            "logprobs_mode": "processed_logprobs",
            **self.llm_kwargs,
        }  # what TRL's trainers read
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            # One engine a process, as TRL starts them; with one seed, a group that is spread over ranks has copies
            given["distributed_executor_backend"] = "external_launcher"
            if given.get("seed") is None:
                given["seed"] = int(os.environ["RANK"])
            _join_ranks()
        length = given.get("max_model_len") or TOKENS
        work = Work(given.get("max_num_seqs") or SEQUENCES, length - length // 2, max(1, length // 2))
        trainee = Trainee(model, None, work, self.max_lora_rank, empty)
        with alone(), serving(lambda: trainee):
            return TurboLLM(**given)


def _join_ranks() -> None:
    """Make the process group of all ranks as the trainer will: vLLM would make one of this rank alone, which stays."""
    if not torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def source_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM must be told of where the checkpoint comes from."""
    return {into: kwargs[name] for name, into in _SOURCE.items() if into and kwargs.get(name) is not None}


def without_values(name: str, dtype: torch.dtype | str, kwargs: Mapping[str, Any]) -> Any:
    """The model that `AutoModelForCausalLM.from_pretrained` would return, save that its parameters hold no values.

    It goes through transformers' own loading, with tensors that nobody writes in the place of the checkpoint's, so that
    the system never provides their memory. Buffers, which no checkpoint has, dtypes, ties, mode and configuration come
    out as they do from a checkpoint.

    Raises:
        TypeError: An argument is for transformers' own loading alone.
        EngineDeclinedError: The model cannot be served from one copy of its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    unknown = sorted(set(kwargs) - set(_SOURCE) - set(_MODEL))
    if unknown:
        raise TypeError(
            f"{unknown[0]} is for transformers' loading, and with fast_inference=True vLLM loads the model; leave it "
            "out or set fast_inference=False"
        )
    source = {key: value for key, value in kwargs.items() if key in _SOURCE}
    settings = {key: value for key, value in kwargs.items() if key in _MODEL}
    config = AutoConfig.from_pretrained(name, **source)
    dtype = _dtype(config, dtype)
    trust = {key: value for key, value in source.items() if key in ("trust_remote_code", "code_revision")}
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, **trust, **settings)
    slots = base_weights(skeleton)
    reason = declined(skeleton, {}, device=vllm_device()) or _stored_buffer(skeleton)
    if reason is not None:
        raise EngineDeclinedError(reason)
    stand_ins = {key: _untouched(slot.parameter) for key, slot in slots.items()}
    model = type(skeleton).from_pretrained(None, config=config, state_dict=stand_ins, dtype=dtype, **settings)
    model.name_or_path = model.config.name_or_path = name
    _generation_config(model, name, source)
    return model


def _dtype(config: Any, dtype: torch.dtype | str) -> torch.dtype:
    found: Any = dtype
    if found == "auto":
        found = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    if not isinstance(found, torch.dtype):
        raise EngineDeclinedError(
            f"dtype={dtype!r} says no dtype and neither does the configuration of the model; pass dtype=torch.bfloat16"
        )
    return found


def _untouched(parameter: torch.Tensor) -> torch.Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")


def _stored_buffer(model: Any) -> str | None:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = sorted(set(model.state_dict()) - parameters)
    return f"the checkpoint has a buffer, {stored[0]}, which vLLM does not load" if stored else None


def _generation_config(model: Any, name: str, source: Mapping[str, Any]) -> None:
    """As transformers: from its file, and where there is none, from the model's configuration."""
    from transformers import GenerationConfig

    where = {key: value for key, value in source.items() if key not in ("trust_remote_code", "code_revision")}
    try:
        model.generation_config = GenerationConfig.from_pretrained(name, **where)
    except OSError:
        return
