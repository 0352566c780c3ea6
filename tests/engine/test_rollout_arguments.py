"""Sampling arguments, guided decoding, tools and multi-turn: the shared engine answers as the one that TRL starts.

One trainer with TRL's own engine, then the same one with ours, on the same weights: what TRL makes of a rollout must be
equal, token by token and mask by mask.
"""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import alone, shut_down
from tests.engine.models import saved, tokenizer
from tests.engine.trainers import dataset, liked, settings

pytestmark = [pytest.mark.vllm, pytest.mark.trl]

pytest.importorskip("vllm")

CALL = r'<tool_call>\n\{"name": "add", "arguments": \{"a": [1-9], "b": [1-9]\}\}\n</tool_call>'
TEXT = ("12+7=", "12+7=", "a longer prompt 3*4=", "a longer prompt 3*4=")
#: Rounding of one log-prob, between TRL's engine on packed weights and ours on the trainer's.
ROUNDING = 5e-3


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def two_turns(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Ask, hand back a fixed answer of an environment, and ask again."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    _, first, first_logps, *_ = trainer.vllm_generation.generate(ids, None, 2)
    told = trainer.processing_class(" ok 9 ")["input_ids"]
    longer = [p + list(f) + told for p, f in zip(ids, first, strict=True)]
    _, second, second_logps, *_ = trainer.vllm_generation.generate(longer, None, 1)
    return {
        "prompt_ids": ids,
        "completion_ids": [[*f, *told, *s] for f, s in zip(first, second, strict=True)],
        "logprobs": [
            [step[0] for step in f] + [0.0] * len(told) + [step[0] for step in s]
            for f, s in zip(first_logps, second_logps, strict=True)
        ],
        "env_mask": [[1] * len(f) + [0] * len(told) + [1] * len(s) for f, s in zip(first, second, strict=True)],
    }


@dataclass(frozen=True)
class Case:
    """What is set on TRL's `VLLMGeneration` and on the trainer, and what of a rollout it must show."""

    sampling: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[Any, ...] = TEXT


CHAT = tuple([{"role": "user", "content": text}] for text in TEXT)
CASES = {
    "greedy": Case(),
    "a seed and all filters": Case(
        {
            "temperature": 0.9,
            "top_p": 0.9,
            "top_k": 20,
            "min_p": 0.02,
            "repetition_penalty": 1.2,
            "generation_kwargs": {"seed": 7},
        }
    ),
    "generation_kwargs": Case(
        {"generation_kwargs": {"presence_penalty": 1.5, "logit_bias": {12: 4.0, 13: -100.0}, "max_tokens": 9}}
    ),
    "stop strings": Case({"generation_kwargs": {"stop": ["<"], "max_tokens": 40}}),
    "a regex": Case({"structured_outputs_regex": r"[0-9]{3}x[a-c]{2}"}),
    "guided by generation_kwargs": Case({"generation_kwargs": {"structured_outputs": {"choice": ["yes", "nope"]}}}),
    "tools": Case({"structured_outputs_regex": CALL, "max_completion_length": 90}, {"tools": [add]}, CHAT),
    "rollout_func": Case({}, {"rollout_func": two_turns}),
}


def make_trainer(tmp: Path) -> Any:
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import qwen2_5_chat_template

    model, _ = saved(tmp, "qwen2_tied", max_position_embeddings=4096)
    words = tokenizer()  # `AutoTokenizer` makes Qwen's of it, which knows no single space
    words.chat_template = qwen2_5_chat_template
    chosen = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 400, "temperature": 1.0}
    made = GRPOTrainer(
        model=model,
        reward_funcs=liked,
        args=settings(GRPOConfig, tmp / "out", vllm_max_model_length=4096, max_tool_calling_iterations=2, **chosen),
        train_dataset=dataset(),
        processing_class=words,
        tools=[add],
    )
    made.model.train()
    # Nothing is trained here, and TRL's sync cannot write into the weights that vLLM repacks on a CPU
    made._last_loaded_step = made.state.global_step
    return made


def rollout(trainer: Any, case: Case) -> dict[str, Any]:
    """One rollout as TRL makes it, with its tensors."""
    wanted = {
        "temperature": 0.0,
        "max_completion_length": 12,
        "generation_kwargs": {},
        "structured_outputs_regex": None,
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {**wanted, **case.sampling}.items():
            assert hasattr(trainer.vllm_generation, name), name
            patched.setattr(trainer.vllm_generation, name, value)
        for name, value in {"tools": [], "rollout_func": None, **case.trainer}.items():
            patched.setattr(trainer, name, value)
        return dict(trainer._generate_and_score_completions([{"prompt": prompt} for prompt in case.prompts]))


def all_of(tmp: Path) -> dict[str, Any]:
    trainer = make_trainer(tmp)
    llm = trainer.vllm_generation.llm
    try:
        found: dict[str, Any] = {name: rollout(trainer, case) for name, case in CASES.items()}
        found["length"] = llm.llm_engine.model_config.max_model_len
        found["shared"] = getattr(llm, "shared", None) is not None
        found["n"] = several(llm)
        return found
    finally:
        shut_down(llm)


def several(llm: Any) -> list[list[int]]:
    """Three answers to one prompt in one request."""
    from vllm import SamplingParams

    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=8)
    output = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)[0]
    return [list(answer.token_ids) for answer in output.outputs]


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    import vllm
    from trl.generation import vllm_generation

    import trl_turbo

    made = {}
    for who in ("trl", "ours"):
        with pytest.MonkeyPatch.context() as patched:
            alone(patched)
            if who == "trl":
                # As TRL starts it; without these vLLM would take 16 bits and compile for minutes
                plain = functools.partial(vllm.LLM, dtype="float32", enforce_eager=True)
                patched.setattr(vllm_generation, "LLM", plain)
            else:
                trl_turbo.patch(logprob=False, rollout=True, verbose=False)
            made[who] = all_of(tmp_path_factory.mktemp(who))
            trl_turbo.unpatch()
            gc.collect()  # the store of the first engine's process group listens until then
    assert made["ours"]["shared"]
    assert not made["trl"]["shared"]
    return made


@pytest.mark.parametrize("name", CASES)
def test_the_engines_agree(name, rollouts):
    ours, theirs = rollouts["ours"][name], rollouts["trl"][name]
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_floating_point():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=ROUNDING, msg=key)
        else:
            assert torch.equal(ours[key], value), key


def test_each_argument_was_at_work(rollouts):
    """Control: an argument that is dropped on the way would make two equal rollouts of TRL's."""
    found = {name: texts(made) for name, made in rollouts["ours"].items() if name in CASES}
    greedy = found.pop("greedy")
    assert greedy[0] == greedy[1]  # the same prompt
    assert all(texts != greedy for texts in found.values())
    assert all(len(ids) <= 9 for ids in found["generation_kwargs"])
    lengths = [len(ids) for ids in found["stop strings"]]
    assert min(lengths) < 40, lengths


def test_tools_were_called_and_answered(rollouts):
    mask = rollouts["ours"]["tools"]["tool_mask"]
    turns = (mask[:, 1:] != mask[:, :-1]).sum(1)
    assert (turns >= 2).all(), turns  # model, tool, model
    assert rollouts["ours"]["length"] == rollouts["trl"]["length"] == 4096


def test_several_answers_in_one_request(rollouts):
    assert rollouts["ours"]["n"] == rollouts["trl"]["n"]
    assert len({tuple(answer) for answer in rollouts["ours"]["n"]}) == 3


def texts(made: dict[str, Any]) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist() for ids, mask in zip(made["completion_ids"], made["completion_mask"], strict=True)
    ]


def test_a_server_stays_a_server(tmp_path, monkeypatch):
    """Nobody listens there: the patched trainer waits for it and fails as TRL does, and starts no engine."""
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    import trl_turbo
    from trl_turbo.engine.llm import TurboLLM

    model, folder = saved(tmp_path, "qwen2_tied")
    started = []
    monkeypatch.setattr(TurboLLM, "__init__", lambda self, *args, **kwargs: started.append(kwargs))
    report = trl_turbo.patch(logprob=False, rollout=True, verbose=False)
    server = {"vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:9", "vllm_server_timeout": 0.5}
    try:
        with pytest.raises(OSError, match=r"127\.0\.0\.1:9"):
            GRPOTrainer(
                model=model,
                reward_funcs=liked,
                args=settings(GRPOConfig, tmp_path / "out", **server),
                train_dataset=dataset(),
                processing_class=AutoTokenizer.from_pretrained(folder),
            )
        assert started == []
        (note,) = (note.text for note in report.notes if note.feature == "rollout")
        assert note.startswith("vllm_mode='server': TRL's own client")
    finally:
        trl_turbo.unpatch()
