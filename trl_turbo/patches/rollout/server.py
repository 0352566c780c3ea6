"""Server mode, which is left as TRL has it, and why adapters are not sent alone there."""

from __future__ import annotations

from typing import Any

from trl_turbo.engine.adapter_config import active_adapter
from trl_turbo.report import note

_LEFT = "vllm_mode='server': TRL's own client, arguments and sync are used as they are"
_ADAPTER = (
    "; the adapter is merged and every weight sent at each sync, since neither TRL's server nor vLLM's takes an "
    "adapter from memory: /v1/load_lora_adapter reads a folder, on the one replica that the request reaches"
)


def told(model: Any) -> None:
    """Note that a trainer with a server samples in TRL's own way."""
    note("rollout", _LEFT + (_ADAPTER if active_adapter(model) is not None else ""))
