"""GRPO where vLLM cannot read the trainer's tensors, in one of two processes; started by `test_parallel`."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

GAP = "sampling/sampling_logp_difference/mean"
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
GPU = torch.cuda.is_available()
LONE = {"num_key_value_heads": 1}  # fewer heads than ranks: vLLM gives each rank a copy


def _rank() -> int:
    return int(os.environ["LAUNCHED_RANK"])


def _slow(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    from tests.engine.trainers import liked

    time.sleep(0.3 * _rank())  # ranks finish at different times
    return liked(completion_ids)


def _raises(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    if _rank() == 1:
        Path(os.environ["LAUNCHED_IN"], "raised").write_text(str(time.time()))
        raise RuntimeError("the reward of rank 1 failed")
    return _slow(completion_ids)


def _model(out: Path, family: str, *, shape: Any = None, changed: bool = False, **_: Any) -> Any:
    from tests.engine.models import saved

    size = {"dtype": torch.bfloat16, "hidden_size": 256, "intermediate_size": 512} if GPU else {}
    model, _ = saved(out / f"model-{_rank()}", family, initializer_range=0.05, **size, **(shape or {}))
    if changed and _rank() == 1:
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.normal_()  # not what the checkpoint says
    return model


def _trainer(out: Path, model: Any, *, kind: str, adapter: bool, reward: Any, **more: Any) -> Any:
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from tests.engine.trainers import trainer

    wanted = {"vllm_tensor_parallel_size": 2, "num_generations": 8, "learning_rate": 2e-2, "max_steps": 3}
    made = trainer(
        kind,
        out,
        peft_config=LoraConfig(**LORA) if adapter else None,
        loaded=(model, AutoTokenizer.from_pretrained(model.name_or_path)),
        **{**wanted, "use_cpu": not GPU, "bf16": GPU, **more},
    )
    made.reward_funcs = [reward]
    return made


def _train(
    out: Path,
    model: Any,
    *,
    kind: str = "GRPO",
    adapter: bool = True,
    reward: Any = _slow,
    applied: str = "served",
    break_push: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Train, and say what the ranks must agree on."""
    from vllm.distributed.parallel_state import destroy_model_parallel

    import trl_turbo

    report = trl_turbo.patch(logprob=False, rollout=True, rollout_adapter=applied, verbose=False)
    _sharded(more.pop("sharded", None))
    trainer = _trainer(out, model, kind=kind, adapter=adapter, reward=reward, **more)
    llm = trainer.vllm_generation.llm if kind == "GRPO" else trainer.llm
    served = llm.served
    copies: list[str] = []
    levels: list[int] = []
    steps: list[int] = []
    if served is not None:
        runner = llm.llm_engine.model_executor.driver_worker.model_runner
        runner.model.load_weights = lambda weights: copies.append("weights were copied")
        trainer.model.merge_adapter = lambda *_, **__: copies.append("the adapter was merged")
        if break_push:
            served.adapter.push = lambda: None
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        schedule = scheduler.schedule

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            steps.append(getattr(output, "tokens", 1))
            return output

        scheduler.schedule = scheduled
    fold = served.fold if served is not None else None
    base = _weights(llm) if fold is not None else []  # the adapter adds nothing yet
    sleep = llm.llm_engine.sleep
    llm.llm_engine.sleep = lambda level=1, *args, **kwargs: (levels.append(level), sleep(level, *args, **kwargs))
    generate = llm.generate
    own: list[bool] = []

    def generated(prompts: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = generate(prompts, *args, **kwargs)
        own.append([output.prompt for output in outputs] == prompts)
        return outputs

    if kind != "GRPO":  # which asks for token ids
        llm.generate = generated
    trainer.train()
    llm.generate = generate
    differs = None
    if kind != "GRPO":  # which logs no log-probs of vLLM's
        llm.wake_up(["kv_cache"])  # TRL leaves it asleep, and vLLM would wait for ever
        llm.refresh()
        differs = served.compare(llm._sample)
    folds = None
    if fold is not None:
        with _awake(llm):
            changed = fold.folded and sum(not torch.equal(*pair) for pair in zip(_weights(llm), base, strict=True))
            fold.restore()
            folds = {"changed": changed, "restored": all(map(torch.equal, _weights(llm), base))}
    found = {
        "differs": differs,
        "own": own,
        "steps": steps,
        "folds": folds,
        "served": served is not None,
        "seed": llm.llm_engine.vllm_config.model_config.seed,
        "shared": llm.shared is not None,
        "copies": copies,
        "levels": levels,
        "gaps": [entry[GAP] for entry in trainer.state.log_history if GAP in entry],
        "notes": [note.text for note in report.notes if note.feature == "rollout"],
        "sharded": any(hasattr(p, "device_mesh") for p in trainer.model.parameters()),
        "trained": {
            name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
            for name, p in trainer.model.named_parameters()
            if p.requires_grad
        },
    }
    llm._give_up()  # vLLM's own shutdown would take the process group along, which the next training needs
    destroy_model_parallel()  # its groups are for one size
    trl_turbo.unpatch()
    gc.freeze()  # as in conftest.py: collected they were already
    return found


@contextmanager
def _awake(llm: Any) -> Iterator[None]:
    """While open, vLLM's weights are in the device's memory, where sleep mode may have taken them out."""
    asleep = llm.served.weights_asleep
    if asleep:
        llm.wake_up(["weights"])
    yield
    if asleep:
        llm.sleep()


def _weights(llm: Any) -> list[torch.Tensor]:
    """A copy of each base weight that an adapter changes, this rank's part of it."""
    with _awake(llm):
        return [layer.weight.clone() for layer in llm.served.adapter.layers()]


WHOLE = {"vllm_tensor_parallel_size": 1, "sharded": {}}
ONE_READS = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
# At the others' learning rate more would be lost to rounding than may be remembered, which "fsdp" is there for
FOLDED = {"applied": "merged", "learning_rate": 8e-3}
#: All in one launch: loading vLLM takes longest. The first to change vLLM for TRL's own sync is "another base".
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "control": ("qwen2_tied", {"break_push": True}),
    "one kv head": ("llama", {"shape": LONE, "vllm_enable_sleep_mode": True}),
    "fused linears": ("phi3", FOLDED),
    "folded, asleep": ("llama", {"shape": LONE, "vllm_enable_sleep_mode": True, **FOLDED}),
    "online dpo": ("qwen2_tied", {"kind": "OnlineDPO", "vllm_enable_sleep_mode": True}),
    "fsdp": ("qwen2_tied", WHOLE | {"applied": "merged"}),
    "fsdp, one rank reads": ("qwen2_tied", {"sharded": ONE_READS, "changed": True, **FOLDED}),
    "another base": ("qwen2_tied", {"changed": True, "max_steps": 1}),
    "full": ("qwen2_tied", {"adapter": False, "max_steps": 1}),
    "raises": ("qwen2_tied", {"reward": _raises}),
}


def _sharded(settings: dict[str, str] | None) -> None:
    """Ask accelerate for FSDP2, as `accelerate launch` does, or for none."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))]:
        del os.environ[name]
    if settings is not None:
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            **settings,
        }


def _fsdp_on_the_cpu() -> None:
    """accelerate shards on GPUs alone, which is one comparison in its state; the rest runs on gloo as it is."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    start = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def _without_device_ids() -> None:
    """TRL's barrier before a tensor parallel rollout names devices, which gloo refuses."""
    barrier = torch.distributed.barrier
    torch.distributed.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)


def _eager() -> None:
    """Engines of TRL's own compile on the CPU, too, which takes longer than all else here."""
    import vllm

    start = vllm.LLM.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{"enforce_eager": True, **kwargs})

    vllm.LLM.__init__ = init


def _own_shared_memory() -> None:
    """vLLM's CPU build names its shared memory after the group alone: two launches, or one that was killed, collide."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    name, launch = _CPUSHMDistributed.make_group_name, os.environ["LAUNCHED_AS"]
    _CPUSHMDistributed.make_group_name = staticmethod(lambda communicator: f"{name(communicator)}-{launch}")


def _unpacked() -> None:
    """On processors with AVX-512 vLLM's CPU build packs weights, into which TRL's own sync cannot load."""
    from vllm.model_executor.layers import utils

    linear = torch.nn.functional.linear

    def plain(layer: Any, *args: Any, **kwargs: Any) -> None:
        layer.cpu_linear = lambda x, weight, bias: linear(x, weight, bias)

    utils.dispatch_cpu_unquantized_gemm = plain


def main(what: str, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LAUNCHED_RANK"] = os.environ["RANK"]  # TRL sets the other
    os.environ["LAUNCHED_IN"] = str(out)
    if not GPU:
        _without_device_ids()
        _fsdp_on_the_cpu()
        _eager()
        _own_shared_memory()
    labels = what.split(";")
    # All before there is a process group, in which transformers saves on the first rank alone
    models = {label: _model(out / label, CASES[label][0], **CASES[label][1]) for label in labels}
    found: dict[str, Any] = {}
    for label in labels:
        if label == "another base":
            _unpacked()
        if label == "raises":
            torch.save(found, out / f"rank-{_rank()}.pt")
        options = {name: value for name, value in CASES[label][1].items() if name not in ("shape", "changed")}
        found[label] = _train(out / label, models[label], **options)
    torch.save(found, out / f"rank-{_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
