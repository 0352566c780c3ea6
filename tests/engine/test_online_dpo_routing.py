"""OnlineDPO with `use_vllm=False`, routed to the engine: TRL prepares prompts and answers, the engine samples."""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import shut_down
from tests.engine.trainers import metric
from tests.engine.trainers import trainer as make_trainer

pytestmark = [pytest.mark.vllm, pytest.mark.trl, pytest.mark.usefixtures("one_process")]


@pytest.fixture
def patched():
    import trl_turbo

    report = trl_turbo.patch(logprob=False, rollout=True, verbose=False)
    yield report
    trl_turbo.unpatch()


def notes(report):
    return [note.text for note in report.notes if note.feature == "rollout"]


def test_a_script_without_vllm_is_routed_and_told(tmp_path, patched, monkeypatch):
    import trl_turbo

    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = make_trainer(
        "OnlineDPO", tmp_path, max_steps=3, use_vllm=False, peft_config=config, initializer_range=0.2
    )
    policy = trained.model
    llm = trained.vllm_generation.llm
    try:
        assert llm.shared is not None
        assert sum("though the script says use_vllm=False" in note for note in notes(patched)) == 1
        assert trained.args.use_vllm is False
        asked = []
        generate = llm.generate
        monkeypatch.setattr(
            llm, "generate", lambda prompts, *a, **k: asked.append(len(prompts)) or generate(prompts, *a, **k)
        )
        monkeypatch.setattr(policy.base_model, "generate", None)  # transformers samples nothing
        trained.train()
        assert asked == [16, 16, 16]
        assert len(metric(trained, "objective/scores")) == 3
        assert any(p.abs().sum() > 0 for n, p in policy.named_parameters() if "lora_B" in n)
        monkeypatch.undo()

        # Greedily, what the two engines give the trainer is the same to the last mask
        prompts = ["12+7=", "a longer prompt 3*4=", "x"]
        monkeypatch.setattr(trained.vllm_generation, "temperature", 0.0)
        monkeypatch.setattr(trained.generation_config, "do_sample", False)
        unstopped = trained._generate(trained.model, prompts)[2]
        assert unstopped.shape == (6, 8)
        ends = [unstopped[0, 2].item(), unstopped[1, 4].item()]
        monkeypatch.setattr(trained.generation_config, "eos_token_id", ends)
        monkeypatch.setattr(trained, "eos_token_ids", ends, raising=False)
        ours = trained._generate(trained.model, prompts)
        assert not torch.equal(ours[2], unstopped)
        others = policy.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
        assert asked == [16, 16, 16]  # who asks without the trainer's configuration gets transformers
        assert others.shape == (1, 6)
        trl_turbo.unpatch()
        theirs = trained._generate(trained.model, prompts)
        assert len(ours) == len(theirs)
        for found, expected in zip(ours, theirs, strict=True):
            assert found is expected is None or torch.equal(found, expected)
    finally:
        shut_down(llm)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"dora": True}, "DoRA"),
    ],
)
def test_what_is_not_routed_samples_with_transformers_and_says_why(change, words, tmp_path, patched):
    peft = pytest.importorskip("peft")
    change = dict(change)
    if change.pop("dora", False):
        change["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    trained = make_trainer("OnlineDPO", tmp_path, max_steps=1, use_vllm=False, **change)
    assert not hasattr(trained, "vllm_generation")
    assert len(notes(patched)) == 1
    assert words in notes(patched)[0]
    assert "transformers samples, as the script says" in notes(patched)[0]


def test_a_trainer_with_a_way_of_its_own_is_left_alone(tmp_path, patched, monkeypatch):
    import trl.experimental.online_dpo as online_dpo

    class Own(online_dpo.OnlineDPOTrainer):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(online_dpo, "OnlineDPOTrainer", Own)
    assert not hasattr(make_trainer("OnlineDPO", tmp_path, max_steps=1, use_vllm=False), "vllm_generation")
    assert "it overrides training_step" in notes(patched)[0]


def test_the_script_may_keep_its_choice(tmp_path):
    import trl_turbo

    report = trl_turbo.patch(logprob=False, rollout="script", verbose=False)
    assert "rollout.online_dpo_routing" not in report
    assert not hasattr(make_trainer("OnlineDPO", tmp_path, max_steps=1, use_vllm=False), "vllm_generation")
    trl_turbo.unpatch()
