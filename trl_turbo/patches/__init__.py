"""The built-in plugins: one module or package a seam, each with a ``turbo_patches`` hook.

They import torch and trl only inside ``probe`` and ``build``, so that ``trl_turbo.patch()`` imports neither.
"""

from __future__ import annotations

#: Plugin modules that come with the package, in the order in which their patches apply.
BUILTIN: tuple[str, ...] = (
    "trl_turbo.patches.logprob",
    # The last one is asked first: a pass that can be packed is, and one that cannot may still attend with our kernel
    "trl_turbo.patches.attention",
    "trl_turbo.patches.packing",
    # Before rollouts, which give their cache up when they end: it must be measured inside of that
    "trl_turbo.patches.memory",
    "trl_turbo.patches.resume",
    "trl_turbo.patches.rollout",
    # Before what replaces MLPs, so that its tiles are cut around whatever those run
    "trl_turbo.patches.checkpointing",
    # After the log-prob: it goes around what that does to a scoring pass
    "trl_turbo.patches.shared_pass",
    # Before the blocks: what is applied last sees a model first, and an MLP with adapters is one function over theirs
    "trl_turbo.patches.lora",
    "trl_turbo.patches.blocks",
    "trl_turbo.patches.people",
)

#: Keywords of ``patch()`` that exist whether or not the plugin module behind them can be imported.
FEATURES: dict[str, str] = {
    "logprob": "fused per-token log-prob, entropy and DPO statistics that never form a [N, V] tensor",
    "rollout": "rollouts from a colocated vLLM that reads the trainer's own weights: no copy, no sync",
    "shared_pass": "one forward for the old policy's log-probs and the training step, where both are the same",
    "lora": "LoRA layers, and MLPs of them, that keep their input once for backward",
    "norms": "RMSNorms that keep their input and one number a row for backward",
    "rope": "rotary embeddings in one pass over queries and keys",
    "attention": "our attention under its own name, and in place of eager and sdpa in scoring passes",
    "packing": "scoring passes without padding, and with each prompt that answers share once",
    "mlp": "gated MLPs that keep gate and up alone between their linears",
    "dashboard": "a live table and charts while a TRL trainer trains, a JSON-lines log and an HTML report",
    "guards": "warnings of what costs people hours, each with its remedy",
    "checkpointing": "gradient checkpointing that keeps layers' inputs in pinned host memory",
    "mlp_tiling": "gated MLPs that run a tile of the sequence at a time",
    "memory": "peaks of each phase beside the plan, and a plan and a checkpoint where memory runs out",
    "resume": "checkpoints that are whole on every rank, or are not resumed from",
}
