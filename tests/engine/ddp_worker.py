"""Trainings with one engine on each of two ranks, which write down what they saw; started by `test_ddp`."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_turbo
from tests.engine.greedy import by_transformers, by_vllm
from tests.engine.models import saved
from tests.engine.trainers import metric
from tests.engine.trainers import trainer as make_trainer

GAP = "sampling/sampling_logp_difference/mean"
SETTINGS = {"max_steps": 3, "learning_rate": 2e-2, "per_device_train_batch_size": 4, "num_generations": 4}
Found = dict[str, Any]


def _rank() -> int:
    return int(os.environ["RANK"])


def _lora() -> Any:
    import peft

    return peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


class Bench:
    """Makes trainers in this process, one after the other, each with an engine of its own and what is on by default."""

    def __init__(self, root: Path) -> None:
        self._root = root / f"rank-{_rank()}"
        _, self._model = saved(self._root / "model")  # once ranks know of each other, transformers lets only one save

    def trainer(self, kind: str = "GRPO", *, fast: bool = False, **more: Any) -> Any:
        if fast:
            settings = {"fast_inference": True, "max_num_seqs": 8, "max_seq_length": 128}
            model, _ = trl_turbo.from_pretrained(self._model, dtype=torch.float32, **settings)
        else:
            model = AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32)
        loaded = model, AutoTokenizer.from_pretrained(self._model)
        return make_trainer(kind, self._root, loaded=loaded, **{**SETTINGS, **more})

    def engine(self, trained: Any) -> Any:
        return trained.vllm_generation.llm if hasattr(trained, "vllm_generation") else trained.llm

    def trained(self, kind: str = "GRPO", **more: Any) -> Found:
        """Train, and compare engine and model after the last update."""
        report = trl_turbo.patch(strict=True, verbose=False)
        before = len(report.notes)
        trained = self.trainer(kind, **more)
        llm = self.engine(trained)
        found: Found = {"shared": llm.shared is not None, "declined": llm.declined, **_watched(llm)}
        trained.train()
        llm.refresh()
        model = trained.accelerator.unwrap_model(trained.model)
        found |= {
            "steps": trained.state.global_step,
            "gaps": metric(trained, GAP),
            "by vllm": by_vllm(llm),
            "by transformers": by_transformers(model),
            "unequal": _unequal(model),
            "moved": llm.shared.check(),
            "merged": llm.shared.fold is not None,
            "notes": [note.text for note in report.notes[before:] if note.feature == "rollout"],
        }
        return self._ended(found, llm)

    def declined(self, plant: Any = None, **more: Any) -> Found:
        """What becomes of a trainer where this rank, or the other one, declines; one step is trained."""
        report = trl_turbo.patch(strict=True, verbose=False)
        before = len(report.notes)
        with plant if plant is not None and _rank() == 1 else replaced.dict({}):
            trained = self.trainer(**{**SETTINGS, "max_steps": 1, **more})
        generation = getattr(trained, "vllm_generation", None)
        notes = [note.text for note in report.notes[before:] if note.feature == "rollout"]
        found = {"use_vllm": trained.use_vllm, "shared": trained.use_vllm and generation.llm.shared is not None}
        trained.train()
        found |= {"notes": notes, "steps": trained.state.global_step}
        return self._ended(found, generation.llm if generation is not None else None)

    def _ended(self, found: Found, llm: Any) -> Found:
        if llm is not None:
            llm._give_up()  # vLLM's own shutdown would end torch.distributed
        trl_turbo.unpatch()
        gc.freeze()  # as in conftest.py: collected they were already
        return found

    def dying(self) -> Found:
        """The second rank raises in its third rollout."""
        trl_turbo.patch(strict=True, verbose=False)
        trained = self.trainer(max_steps=8, save_strategy="steps", save_steps=1)
        llm = self.engine(trained)
        assert llm.shared is not None, llm.declined
        generate = llm.generate

        def raising(*args: Any, **kwargs: Any) -> Any:
            if _rank() == 1 and trained.state.global_step == 2:
                (self._root / "struck").write_text(str(time.time()))
                raise ArithmeticError("planted in a rollout")
            return generate(*args, **kwargs)

        llm.generate = raising
        trained.train()
        return {}

    def split(self) -> Found:
        """What TRL itself gives each rank to sample from."""
        trained = self.trainer(use_vllm=False)
        asked, turn = [], trained._generate_single_turn

        def watched(prompts: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append([list(prompt) for prompt in prompts])
            return turn(prompts, *args, **kwargs)

        trained._generate_single_turn = watched
        trained.train()
        return {"asked": asked}


def _watched(llm: Any) -> dict[str, list[Any]]:
    """Token ids of the prompts and of the completions, for every call of an engine from now on."""
    seen: dict[str, list[Any]] = {"asked": [], "sampled": []}
    generate = llm.generate

    def watched(prompts: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = generate(prompts, *args, **kwargs)
        seen["asked"].append([list(prompt["prompt_token_ids"]) for prompt in prompts])
        seen["sampled"].append([list(output.outputs[0].token_ids) for output in outputs])
        return outputs

    llm.generate = watched
    return seen


def _unequal(model: Any) -> list[str]:
    """Parameters that are not the first rank's, to the bit."""
    found = []
    for name, parameter in model.named_parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, parameter):
            found.append(name)
    return found


def _raising(target: str) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("planted")

    return replaced(target, fail)


def _packs_nothing() -> Any:
    """On processors with AVX-512 vLLM's CPU build packs weights, into which TRL's sync cannot load."""

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    return replaced("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", plain)


def _words(word: str, call: Callable[[], Found]) -> Found:
    with replaced.dict(os.environ, {"TRL_TURBO_ROLLOUT_ADAPTER": word}):
        return call()


def scenarios(bench: Bench) -> dict[str, Callable[[], Found]]:
    beams, others = {"generation_kwargs": {"num_beams": 2}}, {"vllm_model_impl": "transformers"}
    if _rank() == 0:
        beams = others = {}
    return {
        # Before there is a process group, and with groups that are spread over both ranks
        "vllm first": lambda: bench.trained(fast=True, num_generations=8),
        "split": bench.split,
        "full": bench.trained,
        "merged": lambda: _words("merged", lambda: bench.trained(peft_config=_lora())),
        "served": lambda: _words("served", lambda: bench.trained(peft_config=_lora())),
        "routed": lambda: bench.trained("RLOO", use_vllm=False),
        "online": lambda: bench.trained("OnlineDPO", use_vllm=False),
        "not routed": lambda: bench.declined(use_vllm=False, **beams),
        "before": lambda: bench.declined(use_vllm=False, **others),
        "loading": lambda: bench.declined(_raising("trl_turbo.engine.sharing.trace"), use_vllm=False),
        "compared": lambda: bench.declined(_raising("trl_turbo.engine.parity.gap"), use_vllm=False),
        "dying": bench.dying,
        "with a copy": lambda: bench.declined(_raising("trl_turbo.engine.sharing.trace")),
    }


def main(out: str, *names: str) -> None:
    torch.set_num_threads(1)
    bench = Bench(Path(out))
    found = {}
    with _packs_nothing():
        for name, scenario in scenarios(bench).items():
            if name in names if names else name != "dying":
                found[name] = scenario()
    (Path(out) / f"rank-{_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
