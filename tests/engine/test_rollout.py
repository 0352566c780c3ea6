"""GRPO, RLOO and OnlineDPO with `use_vllm=True`, through the patched TRL and a real vLLM."""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import shut_down
from tests.engine.trainers import metric
from tests.engine.trainers import trainer as make_trainer

pytestmark = [pytest.mark.vllm, pytest.mark.trl, pytest.mark.usefixtures("one_process")]

GAP = "sampling/sampling_logp_difference/mean"


@pytest.fixture
def patched():
    import trl_turbo

    report = trl_turbo.patch(logprob=False, rollout=True, verbose=False)
    yield report
    trl_turbo.unpatch()


@pytest.fixture
def trainer(tmp_path):
    made = []

    def make(kind, **settings):
        made.append(make_trainer(kind, tmp_path, **settings))
        return made[-1]

    yield make
    for trained in made:
        shut_down(engine_of(trained))


def engine_of(trained):
    return trained.vllm_generation.llm if hasattr(trained, "vllm_generation") else trained.llm


def notes(report):
    """What the report says of rollouts, save what an old vLLM lacks."""
    texts = [note.text for note in report.notes if note.feature == "rollout"]
    return [text for text in texts if "bursts of tokens need a later vLLM" not in text]


def no_copies(llm, monkeypatch):
    """Any copy of weights into vLLM from here on is an error."""
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model

    def refuse(weights):
        raise AssertionError("weights were copied")

    monkeypatch.setattr(model, "load_weights", refuse, raising=False)


def test_grpo_learns_from_the_weights_it_trains(trainer, patched, monkeypatch):
    trained = trainer("GRPO", max_steps=24, learning_rate=1e-2)
    llm = engine_of(trained)
    assert llm.shared is not None, llm.declined
    no_copies(llm, monkeypatch)
    trained.train()
    rewards = metric(trained, "reward")
    assert sum(rewards[-6:]) / 6 > sum(rewards[:4]) / 4 + 0.2, rewards
    # The importance ratio is 1 as long as vLLM samples from exactly what is trained
    assert max(metric(trained, GAP)) < 1e-3, metric(trained, GAP)
    assert not notes(patched)


def test_grpo_with_an_adapter(trainer, patched, monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = trainer("GRPO", peft_config=config, max_steps=12, learning_rate=2e-2)
    llm = engine_of(trained)
    assert llm.shared is not None, llm.declined
    no_copies(llm, monkeypatch)
    frozen = {n: p.detach().clone() for n, p in trained.model.named_parameters() if "lora_" not in n}
    trained.train()
    assert max(metric(trained, GAP)) < 1e-3, metric(trained, GAP)
    for name, parameter in trained.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize(("further", "without"), [(0, 4), (100, 0)], ids=["first", "all"])
def test_grpo_scores_micro_batches_of_a_rollout_once(trainer, patched, monkeypatch, further, without):
    """Log-probs under the policy that sampled, of rows as TRL will shuffle them, are those of vLLM's samples."""
    import trl_turbo
    from trl_turbo.patches.shared_pass.room import Room

    monkeypatch.setattr(Room, "further", lambda *_: further)
    trl_turbo.unpatch()
    trl_turbo.patch(rollout=True, verbose=False)
    trained = trainer("GRPO", per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2)
    assert engine_of(trained).shared is not None, engine_of(trained).declined
    grads = []
    trained.model.register_forward_pre_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    trained.train()
    assert (sum(grads), len(grads) - sum(grads)) == (8, without)
    assert max(metric(trained, GAP)) < 1e-3, metric(trained, GAP)


def test_grpo_on_packed_rows(trainer, patched, monkeypatch):
    """vLLM's log-probs of what it sampled are those of the packed passes, in which a group's prompt is there once."""
    import trl_turbo
    from trl_turbo.patches.attention import passes

    trl_turbo.unpatch()
    trl_turbo.patch(rollout=True, packing=True, verbose=False)
    shared, arrange = [], passes._arrange

    def watched(*args):
        found = arrange(*args)
        assert isinstance(found, passes.Arranged), found
        shared.append(max(found.layout.segments.prefix) >= 0)
        return found

    monkeypatch.setattr(passes, "_arrange", watched)
    trained = trainer("GRPO", max_steps=4, learning_rate=1e-2)
    assert engine_of(trained).shared is not None, engine_of(trained).declined
    trained.train()
    assert any(shared)  # a prompt of one token has nothing to share
    assert max(metric(trained, GAP)) < 1e-3, metric(trained, GAP)


def test_grpo_in_4_bits_with_an_adapter(trainer, patched, monkeypatch):
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = trainer("GRPO", peft_config=config, four_bit=True, max_steps=48, learning_rate=1e-2)
    llm = engine_of(trained)
    assert llm.shared is not None, llm.declined
    no_copies(llm, monkeypatch)
    frozen = {n: p.detach().clone() for n, p in trained.model.named_parameters() if "lora_" not in n}
    trained.train()
    rewards = metric(trained, "reward")
    assert sum(rewards[-12:]) / 12 > sum(rewards[:12]) / 12 + 0.08, rewards
    assert max(metric(trained, GAP)) < 2e-2, metric(trained, GAP)  # rounding to bfloat16; 0.6 with a stale adapter
    assert llm.shared.check() == 0
    for name, parameter in trained.model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name
    assert any("because the base is quantised" in text for text in notes(patched))


def test_a_resumed_run_samples_from_the_weights_it_loaded(trainer, tmp_path, patched):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"peft_config": config, "learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 2}
    first = trainer("GRPO", max_steps=2, **settings)
    first.train()
    shut_down(engine_of(first))
    again = trainer("GRPO", max_steps=4, **settings)
    assert engine_of(again).shared is not None, engine_of(again).declined
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert again.state.global_step == 4
    assert max(metric(again, GAP)) < 1e-3, metric(again, GAP)
    lora = [p for n, p in again.model.named_parameters() if "lora_B" in n]
    assert all(p.abs().sum() > 0 for p in lora)


def test_control_without_a_push_the_log_probs_part(trainer, patched, monkeypatch):
    from trl_turbo.engine.adapter import ServedAdapter

    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = trainer("GRPO", peft_config=config, max_steps=6, learning_rate=2e-2)
    monkeypatch.setattr(ServedAdapter, "push", lambda self: None)
    trained.train()
    assert max(metric(trained, GAP)) > 1e-2


@pytest.mark.parametrize(("kind", "reward"), [("RLOO", "reward"), ("OnlineDPO", "objective/scores")])
def test_the_others_learn_too_and_in_sleep_mode(kind, reward, trainer, patched, monkeypatch):
    trained = trainer(kind, max_steps=24, learning_rate=1e-2, vllm_enable_sleep_mode=True)
    llm = engine_of(trained)
    assert llm.shared is not None, llm.declined
    no_copies(llm, monkeypatch)
    trained.train()
    rewards = metric(trained, reward)
    assert len(rewards) == 24
    assert sum(rewards[-6:]) / 6 > sum(rewards[:4]) / 4 + 0.2, rewards


def test_what_is_declined_runs_on_trls_own_path_and_says_so(trainer, patched, monkeypatch):
    from vllm.model_executor.layers import utils

    # On processors with AVX-512 vLLM's CPU build packs weights, into which TRL's sync cannot load
    linear = torch.nn.functional.linear
    plain = lambda layer, remove_weight: setattr(layer, "cpu_linear", linear)  # noqa: E731
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", plain)
    peft = pytest.importorskip("peft")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    trained = trainer("GRPO", peft_config=config, max_steps=1)
    assert engine_of(trained).shared is None
    said = notes(patched)
    assert len(said) == 1
    assert "DoRA" in said[0]
    assert "TRL's own engine" in said[0]
    trained.train()
    assert len(metric(trained, "reward")) == 1


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_script_without_vllm_is_routed_and_told(kind, trainer, patched, monkeypatch):
    trained = trainer(kind, max_steps=8, use_vllm=False, learning_rate=1e-2)
    assert trained.use_vllm
    assert trained.args.use_vllm is False
    llm = engine_of(trained)
    assert llm.shared is not None, llm.declined
    no_copies(llm, monkeypatch)
    monkeypatch.setattr(type(trained.model), "generate", None)  # transformers samples nothing
    trained.train()
    said = notes(patched)
    assert len(said) == 1
    assert "though the script says use_vllm=False" in said[0]
    assert len(metric(trained, "reward")) == 8
    if kind == "GRPO":
        assert max(metric(trained, GAP)) < 1e-3, metric(trained, GAP)


def test_the_script_may_keep_its_choice(tmp_path):
    import trl_turbo

    trl_turbo.patch(logprob=False, rollout="script", verbose=False)
    trained = make_trainer("GRPO", tmp_path, max_steps=1, use_vllm=False)
    assert not trained.use_vllm
    trl_turbo.unpatch()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"adapter": True}, "DoRA"),
    ],
)
def test_what_is_not_routed_samples_with_transformers_and_says_why(change, words, tmp_path, patched):
    peft = pytest.importorskip("peft")
    change = dict(change)
    config = None
    if change.pop("adapter", False):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    trained = make_trainer("GRPO", tmp_path, max_steps=1, use_vllm=False, peft_config=config, **change)
    assert not trained.use_vllm
    said = notes(patched)
    assert len(said) == 1
    assert words in said[0]
    assert "transformers samples, as the script says" in said[0]
    if config is not None:
        trained.train()
        assert len(metric(trained, "reward")) == 1


def test_a_script_is_not_routed_to_an_engine_that_is_not_ours(tmp_path, patched, monkeypatch):
    """Where TRL supports no installed vLLM, or somebody put another class there, the script samples as it says."""
    from trl.generation import vllm_generation

    monkeypatch.delattr(vllm_generation, "LLM")
    trained = make_trainer("RLOO", tmp_path, max_steps=1, use_vllm=False)
    assert not trained.use_vllm
    assert "TRL found no vLLM" in notes(patched)[0]


def test_unpatched_trl_is_stock_again():
    import vllm
    from trl.generation import vllm_generation

    import trl_turbo

    original = vllm_generation.VLLMGeneration.sync_weights
    trl_turbo.patch(rollout=True, verbose=False)
    assert issubclass(vllm_generation.LLM, vllm.LLM)
    assert vllm_generation.LLM is not vllm.LLM
    trl_turbo.unpatch()
    assert vllm_generation.LLM is vllm.LLM
    assert vllm_generation.VLLMGeneration.sync_weights is original
