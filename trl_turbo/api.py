"""``patch()``, ``unpatch()`` and ``status()``: the one session of the process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trl_turbo.report import Report

# The session's module is imported by the first call: a script that only imports the package pays nothing for it.

__all__ = ["engine", "patch", "patch_trl", "status", "unpatch"]


def patch(
    *,
    strict: bool = False,
    verbose: bool | None = None,
    logprob: bool | None = None,
    rollout: bool | Literal["script"] | None = None,
    rollout_adapter: Literal["auto", "merged", "served"] | None = None,
    rollout_burst: Literal["auto", "off"] | None = None,
    rollout_kernels: Literal["auto", "off"] | None = None,
    rollout_kv_cache_dtype: Literal["auto", "fp8"] | None = None,
    shared_pass: bool | None = None,
    lora: bool | None = None,
    norms: bool | None = None,
    rope: bool | None = None,
    mlp: bool | None = None,
    attention: bool | None = None,
    packing: bool | None = None,
    dashboard: bool | None = None,
    guards: bool | None = None,
    guard_chat_template: bool | None = None,
    guard_constant_reward: bool | None = None,
    guard_truncated: bool | None = None,
    guard_learning_rate: bool | None = None,
    guard_group_size: bool | None = None,
    guard_logp_drift: bool | None = None,
    guard_context: bool | None = None,
    checkpointing: bool | None = None,
    mlp_tiling: bool | None = None,
    memory: bool | None = None,
    resume: bool | None = None,
    **features: bool | None,
) -> Report:
    """Patch TRL in place. Call it anywhere in a script, before or after the imports.

    Modules that are imported already are patched at once, the others when they are imported. A second call changes only
    what it asks for differently: each call states every switch anew.

    Args:
        strict: Raise where a patch is skipped or fails, after taking everything back; for a module that is imported
            later, raise from that import. What is turned off by a switch is no error.
        verbose: ``None`` logs one line to the logger ``trl_turbo``, ``True`` the table as well, ``False`` nothing.
        logprob: The fused log-prob in GRPO, RLOO, DPO, OnlineDPO and PPO.
        rollout: Rollouts of GRPO, RLOO, OnlineDPO and PPO from a colocated vLLM that reads the trainer's own weights.
            With ``use_vllm=False``, and in PPO, which has no vLLM of its own, trainers are routed to it where vLLM is
            installed and the model can be shared; ``"script"`` leaves that choice to the script.
        rollout_adapter: How a LoRA adapter gets into rollouts: ``"merged"`` folds it into the base weights for each and
            takes it out again to the bit, ``"served"`` lets vLLM apply it in every layer, ``"auto"`` merges into a
            16-bit base. ``None`` leaves it to ``TRL_TURBO_ROLLOUT_ADAPTER``, and that to ``auto``.
        rollout_burst: ``"off"`` takes every token through vLLM's scheduler by itself, instead of 16 at a time while all
            sequences just go on. ``None`` leaves it to ``TRL_TURBO_ROLLOUT_BURST``, and that to ``auto``.
        rollout_kernels: ``"off"`` leaves CUDA graphs of small decode batches to vLLM's kernels. ``None`` leaves it to
            ``TRL_TURBO_ROLLOUT_KERNELS``, and that to ``auto``: our own where they compute what the model does.
        rollout_kv_cache_dtype: ``"fp8"`` halves the KV cache of a 16-bit model; samples then come from a slightly
            different policy. ``None`` leaves it to ``TRL_TURBO_ROLLOUT_KV_CACHE_DTYPE``, and that to ``auto``, the
            model's own dtype.
        shared_pass: GRPO and RLOO score micro-batches of a rollout, under the policy that sampled it, with the forwards
            of their training steps, where the optimizer does not step in between and memory has room for their graphs.
        lora: PEFT's LoRA layers over bf16, fp16, fp32 and bitsandbytes bases, the projections of attention together and
            gated MLPs as one function.
        norms: RMSNorms of any model that computes what our op does, found out on random input.
        rope: The rotary embedding of any model whose ``apply_rotary_pos_emb`` computes what our op does.
        mlp: Gated MLPs of any model, between their own linears, where they compute what our op does.
        attention: Our attention, which ``attn_implementation="trl_turbo"`` selects, in place of eager and sdpa in the
            scoring passes of models whose attention computes what ours does.
        packing: Scoring passes on one packed row: without padding, and with each prompt that several answers share
            once.
        dashboard: While a TRL trainer trains, a live table and small charts where its progress bars are, and in
            ``<output_dir>/_trl_turbo`` a JSON-lines log, the latest completions and at the end an HTML report.
        guards: Warnings of what costs people hours, each with its remedy and each off by its own keyword:
        guard_chat_template: chats, and a tokenizer without a chat template;
        guard_constant_reward: a reward that does not change for many steps;
        guard_truncated: no completion that comes to its end;
        guard_learning_rate: a learning rate for LoRA that is far off TRL's default;
        guard_group_size: a group size that does not divide the batch;
        guard_logp_drift: log-probs of rollouts that drift away from the trainer's;
        guard_context: prompts that are longer than the context.
        checkpointing: With ``gradient_checkpointing=True``, layers' inputs wait for backward in pinned host memory, to
            the bit, unless that is short or waiting for the copies takes more than 3 % of forward and backward.
        mlp_tiling: Gated MLPs run at most 8,192 rows at a time, in checkpointed layers and in passes without gradients.
        memory: ``status()`` shows what rollouts and training took at the driver beside what :func:`trl_turbo.plan`
            predicts; running out of memory raises the same error with the plan, what overflowed and the one setting to
            change, and saves the last completed step first.
        resume: ``resume_from_checkpoint=True`` goes on from the last checkpoint that every rank had written to its end.
        **features: Features of third-party plugins. For every feature, ``True`` and ``False`` win over
            ``TRL_TURBO_<FEATURE>`` in the environment, and ``None`` leaves it to that, which is on by default
            (``mlp_tiling`` is off until it is measured on a GPU).
            ``TRL_TURBO=0`` turns everything off, keywords or not; ``TRL_TURBO_PLUGINS=0`` leaves out third parties.

    Returns:
        What is applied, pending, skipped and why: print it, or read its rows.

    Raises:
        TypeError: A keyword names no feature, or its value is neither a bool nor ``None``.
        ValueError: A switch in the environment is neither on nor off, or a setting is none of its words.
        PatchError: Under ``strict``, a patch was skipped or failed.
    """
    from trl_turbo._process import session

    return session.patch(
        strict=strict,
        verbose=verbose,
        features={
            "logprob": logprob,
            "rollout": rollout,
            "rollout_adapter": rollout_adapter,
            "rollout_burst": rollout_burst,
            "rollout_kernels": rollout_kernels,
            "rollout_kv_cache_dtype": rollout_kv_cache_dtype,
            "shared_pass": shared_pass,
            "lora": lora,
            "norms": norms,
            "rope": rope,
            "mlp": mlp,
            "attention": attention,
            "packing": packing,
            "dashboard": dashboard,
            "guards": guards,
            "guard_chat_template": guard_chat_template,
            "guard_constant_reward": guard_constant_reward,
            "guard_truncated": guard_truncated,
            "guard_learning_rate": guard_learning_rate,
            "guard_group_size": guard_group_size,
            "guard_logp_drift": guard_logp_drift,
            "guard_context": guard_context,
            "checkpointing": checkpointing,
            "mlp_tiling": mlp_tiling,
            "memory": memory,
            "resume": resume,
            **features,
        },
    )


patch_trl = patch


def unpatch() -> Report:
    """Take every patch back: classes and modules are what they were before. Harmless where nothing is patched.

    Returns:
        The rows, all ``off``, save those that are ``blocked``: somebody else has wrapped what we had wrapped. Ours
        passes through to the original there, and the next ``unpatch()`` after theirs is gone removes it.
    """
    from trl_turbo._process import session

    return session.unpatch()


def status() -> Report:
    """Return where every patch stands now; without rows before the first ``patch()``."""
    from trl_turbo._process import session

    return session.status()


def engine(config: Any) -> object | None:
    """Return the generation engine that a plugin has for ``config``, or ``None``."""
    from trl_turbo._process import session

    return session.engine(config)
