"""A plan from a model's sizes and the settings of a script: arithmetic alone, nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from trl_turbo._features import OPT_IN
from trl_turbo.engine import sizing
from trl_turbo.kernels.linear_logprob import plan as tiles
from trl_turbo.memory_plan import sizes as model_sizes
from trl_turbo.memory_plan.layer import layer_bytes
from trl_turbo.memory_plan.sizes import Sizes
from trl_turbo.memory_plan.table import BACKWARD, KEPT, ROLLOUT, SCORING, MemoryPlan

MIB = 1 << 20
#: Features of `patch()` that change memory.
FEATURES = (
    "logprob",
    "rollout",
    "lora",
    "norms",
    "rope",
    "mlp",
    "attention",
    "packing",
    "checkpointing",
    "mlp_tiling",
)
#: Those that `patch()` has on by default.
DEFAULT_FEATURES = tuple(feature for feature in FEATURES if feature not in OPT_IN)
TRAINERS = ("grpo", "rloo", "dpo", "online_dpo", "ppo")
# These and `sizing.GRAPH_BYTES` are estimates, from runs on an H200; in that of
# benchmarks/results/grpo_1.5b_8x4096.json the plan was 3 % and 4 % below what rollouts and training took.
# `benchmarks.plan` measures how far off they are elsewhere.
#: The CUDA context with the kernels that training loads on first use.
CONTEXT_BYTES = 820 * MIB
#: Kernels and buffers that vLLM loads and makes beside weights, cache, graphs and adapter.
ENGINE_BYTES = 700 * MIB
#: Share of what comes and goes that torch's allocator holds on top, in blocks that nothing fits into.
FRAGMENTATION = 0.12
#: cuBLAS's workspaces, 32 MiB each on Hopper: forward and backward run in a thread each, with a handle of its own.
WORKSPACE_BYTES = 2 * 33 * MIB
#: Blocks of an 8-bit optimizer state have a float32 scale each.
EIGHT_BIT_BYTES = 2 * (1 + 4 / 256)


@dataclass(frozen=True)
class Settings:
    """What of a script decides its memory.

    Attributes:
        trainer: Of `TRAINERS`.
        group: Sequences that are sampled together.
        prompt: Tokens of the longest prompt.
        completion: Tokens of the longest completion.
        micro_batch: Rows of a training micro-batch, as `per_device_train_batch_size` counts them.
        gradient_checkpointing: Whether layers keep their input alone.
        vllm: Whether a vLLM in this process samples.
        releases_kv: Whether the KV cache is given up for training.
        eager: Whether vLLM captures no graphs.
        optimizer: As in `optim`.
        reference: Copies of the base model beside the policy.
        features: Features of `patch()` that are on.
        padded: Whether sequences of a micro-batch differ in length, which makes sdpa take a mask.
        kv_itemsize: Bytes of one element of the KV cache.
    """

    trainer: str = "grpo"
    group: int = 8
    prompt: int = 512
    completion: int = 4096
    micro_batch: int = 8
    gradient_checkpointing: bool = True
    vllm: bool = True
    releases_kv: bool = True
    eager: bool = False
    optimizer: str = "adamw_torch"
    reference: int = 0
    features: tuple[str, ...] = DEFAULT_FEATURES
    padded: bool = False
    kv_itemsize: int = 2

    @property
    def sequences(self) -> int:
        """Sequences in one forward: a pair of completions is two."""
        return self.micro_batch * (2 if self.trainer in ("dpo", "online_dpo") else 1)

    @property
    def tokens(self) -> int:
        """Tokens in one forward: answers that are packed have their prompt in common."""
        prompts = self.micro_batch if self.trainer in ("dpo", "online_dpo") else 1
        return self.sequences * self.completion + (prompts if self.packed else self.sequences) * self.prompt

    @property
    def packed(self) -> bool:
        """Whether the sequences of a forward are one row."""
        return "packing" in self.features and self.trainer != "ppo"

    @property
    def masked(self) -> bool:
        """Whether sdpa takes a mask."""
        return self.padded and self.sequences > 1 and not {"packing", "attention"} & set(self.features)


def predict(
    config: Any,
    *,
    trainer: str = "grpo",
    group: int = 8,
    prompt: int = 512,
    completion: int = 4096,
    micro_batch: int | None = None,
    lora_rank: int = 16,
    load_in_4bit: bool = False,
    gradient_checkpointing: bool = True,
    vllm: bool | None = None,
    gpu_bytes: int | None = None,
    features: Iterable[str] | None = None,
    optimizer: str = "adamw_torch",
    beta: float = 0.0,
    padded: bool = False,
    eager: bool = False,
    itemsize: int = 2,
    context_bytes: int = CONTEXT_BYTES,
) -> MemoryPlan:
    """Predict the memory of a training from a model's configuration; loads no weights and needs no GPU.

    Args:
        config: transformers' configuration, such as `AutoConfig.from_pretrained` returns.
        trainer: `grpo`, `rloo`, `dpo`, `online_dpo` or `ppo`.
        group: Sequences that are sampled together: `per_device_train_batch_size * steps_per_generation`.
        prompt: Tokens of the longest prompt.
        completion: Tokens of the longest completion.
        micro_batch: `per_device_train_batch_size`; all of the group by default.
        lora_rank: Of an adapter on every linear but the head; 0 trains all weights.
        load_in_4bit: Whether the base is double-quantised nf4.
        gradient_checkpointing: As in the trainer's configuration.
        vllm: Whether a vLLM in this process samples; by default where the trainer samples.
        gpu_bytes: Size of the device.
        features: Features of `patch()` that are on; by default those that `patch()` has on by default.
        optimizer: As in `optim`.
        beta: The KL coefficient; above 0 without an adapter, GRPO and RLOO keep a copy of the model.
        padded: Whether sequences of a micro-batch differ in length.
        eager: Whether vLLM captures no graphs.
        itemsize: Bytes of a 16-bit or 32-bit weight.
        context_bytes: The CUDA context.

    Raises:
        ValueError: There is no such trainer or feature, or a size is not positive.
    """
    if trainer not in TRAINERS:
        raise ValueError(f"there is no plan for the trainer {trainer!r}; name one of {', '.join(TRAINERS)}")
    chosen = DEFAULT_FEATURES if features is None else tuple(features)
    unknown = sorted(set(chosen) - set(FEATURES))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no feature that changes memory; they are {', '.join(FEATURES)}")
    numbers = {"group": group, "prompt": prompt, "completion": completion, "micro_batch": micro_batch or group}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; pass 1 or more")
    sizes = model_sizes.of_config(config, rank=lora_rank, load_in_4bit=load_in_4bit, itemsize=itemsize)
    settings = Settings(
        trainer=trainer,
        group=group,
        prompt=prompt,
        completion=completion,
        micro_batch=micro_batch or group,
        gradient_checkpointing=gradient_checkpointing,
        vllm=trainer != "dpo" if vllm is None else vllm and trainer != "dpo",
        eager=eager,
        optimizer=optimizer,
        reference=references(trainer, adapters=lora_rank > 0, beta=beta),
        features=chosen,
        padded=padded,
        kv_itemsize=itemsize,
    )
    return make(sizes, settings, gpu_bytes=gpu_bytes, context_bytes=context_bytes)


def references(trainer: str, *, adapters: bool, beta: float) -> int:
    """How many further models of the policy's size a trainer keeps.

    Args:
        trainer: Of `TRAINERS`.
        adapters: Whether an adapter is trained: the base without it is the reference then.
        beta: The KL coefficient.
    """
    if trainer == "ppo":  # reward and value models, and the reference
        return 2 + (not adapters)
    if adapters:
        return 0
    return int(beta > 0 or trainer in ("dpo", "online_dpo"))


def make(
    sizes: Sizes,
    settings: Settings,
    *,
    gpu_bytes: int | None = None,
    context_bytes: int = CONTEXT_BYTES,
    known: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """The plan of a model under settings.

    Args:
        sizes: The model.
        settings: The script.
        gpu_bytes: Size of the device.
        context_bytes: The CUDA context.
        known: Parts that were measured, by name, in the place of those that are predicted.
    """
    known = dict(known or {})
    always = {
        "weights": sizes.weight_bytes,
        "other models": settings.reference * sizes.weight_bytes,
        "adapters": sizes.adapter_bytes,
        "optimizer": _optimizer_bytes(sizes, settings),
        "CUDA context": context_bytes + WORKSPACE_BYTES,
    }
    engine = _engine(sizes, settings)
    always |= {part: size for part, size in known.items() if part in always}
    engine |= {part: size for part, size in known.items() if part not in always}
    cache = engine.pop("KV cache", 0)
    stays = engine if settings.releases_kv or not cache else {**engine, "KV cache": cache}
    trained = always | stays | {"gradients": sizes.trainable_bytes}
    moments: dict[str, dict[str, int]] = {}
    if settings.trainer != "dpo":
        moments[ROLLOUT] = always | engine | {"KV cache": cache} | _sampling(sizes, settings)
    between, layer = _activations(sizes, settings)
    moments[SCORING] = trained | between | _loss(sizes, settings)
    moments[BACKWARD] = trained | between | {"one layer": layer} | _mask(settings)
    for parts in moments.values():
        parts["fragmentation"] = int(FRAGMENTATION * sum(size for part, size in parts.items() if part in _COMING))
    if "rollout" in settings.features and settings.releases_kv and ROLLOUT in moments:
        most = max(sum(moments[moment].values()) for moment in (SCORING, BACKWARD))
        if cache <= sizing.LITTLE_CACHE * most:  # the engine leaves torch what training took
            moments[ROLLOUT][KEPT] = max(0, most - sum(moments[ROLLOUT].values()))

    def again(**changes: Any) -> MemoryPlan:
        other = replace(settings, **changes)
        left = {part: size for part, size in known.items() if part != "KV cache"}  # which grows with the completion
        return make(sizes, other, gpu_bytes=gpu_bytes, context_bytes=context_bytes, known=left)

    shown = {moment: {part: size for part, size in parts.items() if size} for moment, parts in moments.items()}
    described = {**asdict(settings), "features": list(settings.features)}
    return MemoryPlan(shown, described, gpu_bytes, tuple(_notes(sizes, settings)), again)


#: Parts that torch's allocator makes and frees within a step.
_COMING = ("layer inputs", "activations", "one layer", "loss tiles", "logits", "attention mask", "sampling")


def _optimizer_bytes(sizes: Sizes, settings: Settings) -> int:
    name = settings.optimizer
    if "paged" in name:
        return 0  # in memory that the driver moves to the host
    if "8bit" in name:
        return int(sizes.trainable * EIGHT_BIT_BYTES)
    if name.startswith("sgd"):
        return 0
    return 2 * sizes.trainable_bytes


def _engine(sizes: Sizes, settings: Settings) -> dict[str, int]:
    """What vLLM holds beside the weights, by part, its cache included."""
    if not settings.vllm:
        return {}
    text = sizes.config
    work = sizing.Work(settings.group, settings.completion, settings.prompt)
    limit = settings.prompt + settings.completion
    plan = sizing.plan(text, work, {"max_model_len": limit}, itemsize=settings.kv_itemsize, graphs=not settings.eager)
    graphs = plan.llm_kwargs.get("compilation_config", {}).get("cudagraph_capture_sizes", [])
    copies = 0 if "rollout" in settings.features else sizes.weight_bytes
    # vLLM has 16-bit buffers for an adapter, folded into the base or not; TRL's own rollouts merge it
    buffers = 2 * sizes.adapter_bytes // sizes.adapter_itemsize if "rollout" in settings.features else 0
    found = {
        "KV cache": plan.kv_bytes,
        "engine": ENGINE_BYTES,
        "CUDA graphs": len(graphs) * sizing.GRAPH_BYTES,
        "engine's weights": copies,
        "engine's adapter": buffers,
    }
    return {part: size for part, size in found.items() if size}


def _sampling(sizes: Sizes, settings: Settings) -> dict[str, int]:
    """Activations of a prefill and the scores of one decode step."""
    c = sizes.itemsize
    tokens = min(sizing.MAX_BATCHED_TOKENS, settings.group * settings.prompt)
    prefill = tokens * c * (4 * sizes.hidden + 2 * sizes.heads + 2 * sizes.kv + 3 * sizes.inner)
    scores = settings.group * sizes.vocab * 4 * 4  # logits and probabilities in float32, sorted for top-p
    cached = 0
    if not settings.vllm:
        per_token = sizing.kv_bytes_per_token(sizes.config, c)
        # transformers' cache grows by concatenation: old and new of one layer exist together
        cached = (
            settings.group * (settings.prompt + settings.completion) * per_token * (1 + sizes.layers) // sizes.layers
        )
    dense = c * sizes.largest_linear if sizes.packed else 0
    return {"sampling": prefill + scores + cached + dense}


def _activations(sizes: Sizes, settings: Settings) -> tuple[dict[str, int], int]:
    """What all layers keep between forward and backward, by part, and what the backward of one takes on top."""
    layer = layer_bytes(
        sizes,
        settings.tokens,
        settings.features,
        repeated_kv=settings.masked,
        recomputed=settings.gradient_checkpointing,
    )
    one_input = settings.tokens * sizes.hidden * sizes.itemsize
    if not settings.gradient_checkpointing:
        return {"activations": (sizes.layers - 1) * layer.kept}, layer.peak
    if "checkpointing" in settings.features:
        # The one in use is the layer's own; one is on its way, and one is held until its copy has ended
        return {"layer inputs": min(2, sizes.layers - 1) * one_input}, layer.peak
    return {"layer inputs": (sizes.layers - 1) * one_input}, layer.peak


def _mask(settings: Settings) -> dict[str, int]:
    """A mask of sdpa for every sequence: one byte a pair of tokens, and the 16-bit bias that the kernel makes of it."""
    if not settings.masked:
        return {}
    return {"attention mask": 3 * settings.sequences * (settings.prompt + settings.completion) ** 2}


def _loss(sizes: Sizes, settings: Settings) -> dict[str, int]:
    """From the last layer's output to log-probs."""
    c, h = sizes.itemsize, sizes.hidden
    rows = settings.sequences * settings.completion
    norm = 4 if "norms" not in settings.features else 0
    stream = settings.tokens * h * (2 * c + norm)  # what the last layer gave, and its norm
    if "logprob" not in settings.features:
        return {"logits": stream + rows * sizes.vocab * (c + 8)} | _mask(settings)
    trained = not sizes.has_adapters
    if trained:
        tile = tiles.vocab_outer(rows, sizes.vocab, h, c, None)
        made = tile[1] * (tile[0] * c + 4 * h) + rows * h * c
        head = sizes.vocab * h * c  # its gradient, before it joins the others
    else:
        tile = tiles.rows_outer(rows, sizes.vocab, h, c, None)
        made = tile[0] * (tile[1] * c + 4 * h) + rows * h * c
        head = 0
    return {"loss tiles": stream + rows * h * c + made + head} | _mask(settings)


def _notes(sizes: Sizes, settings: Settings) -> Iterable[str]:
    if not sizes.inner:
        yield "no gated MLP was found in its layers: what their inside takes (experts, say) is not counted"
    if "logprob" not in settings.features:
        yield "TRL's own path is counted with full logits, as up to 1.14; from 1.15 on it has a fused head"
    if "paged" in settings.optimizer:
        yield "a paged optimizer's state is in memory that the driver may move to the host: none of it is counted"
