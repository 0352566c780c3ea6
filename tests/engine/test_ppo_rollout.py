"""PPO (TRL up to 1.12), which samples through the shared engine, with the fused log-prob and without it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.engine.conftest import shut_down
from tests.engine.trainers import metric, ppo

pytestmark = [pytest.mark.vllm, pytest.mark.trl, pytest.mark.usefixtures("one_process")]

pytest.importorskip("vllm")
module = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="TRL has no PPO since 1.13")

from trl_turbo.patches.rollout import ppo as rollout  # noqa: E402 -- needs TRL's

#: Rounding of one log-prob: vLLM's attention on a CPU takes a fast exponential.
ROUNDING = 5e-3


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    import trl_turbo

    trl_turbo.unpatch()


def patch(**features):
    import trl_turbo

    return trl_turbo.patch(**{"rollout": True, "verbose": False, **features})


def notes(report):
    return [note.text for note in report.notes if note.feature == "rollout"]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """One trainer and its engine for all tests of full fine-tuning; a second `train()` goes on from the first."""
    report = patch()
    made = ppo(tmp_path_factory.mktemp("ppo"))
    assert "PPOTrainer: samples from a vLLM that shares its weights" in notes(report)[0]
    assert made.vllm_generation.llm.shared is not None
    made.untrained = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    yield made
    shut_down(made.vllm_generation.llm)


@pytest.fixture
def watched(monkeypatch):
    """Compare vLLM's own log-probs of each rollout with those that PPO trains with; transformers samples nothing."""

    def watch(trained):
        gaps, kinds = [], set()
        generation = trained.vllm_generation
        monkeypatch.setattr(generation, "logprobs", 0)
        policy = trained.model.policy
        monkeypatch.setattr(getattr(policy, "base_model", policy), "generate", None, raising=False)
        generate, batch_generation, seen = generation.generate, module.batch_generation, []

        def recorded(*args, **kwargs):
            seen[:] = generate(*args, **kwargs)
            return tuple(seen)

        def compared(model, queries, *args):
            query_responses, scores = batch_generation(model, queries, *args)
            response = query_responses[:, queries.shape[1] :]
            assert torch.equal(query_responses[:, : queries.shape[1]], queries)
            assert response.shape[1] == max(map(len, seen[1]))
            rows = scores[0 : len(queries)]
            kinds.add(type(rows))
            own = module.selective_log_softmax(rows, response)
            for row, ids, logprobs in zip(range(len(queries)), seen[1], seen[2], strict=True):
                assert response[row].tolist() == list(ids) + [0] * (response.shape[1] - len(ids))
                theirs = torch.tensor([step[0] for step in logprobs])
                gaps.append((own[row, : len(ids)] - theirs).abs().mean().item())
            return query_responses, scores

        monkeypatch.setattr(generation, "generate", recorded)
        monkeypatch.setattr(module, "batch_generation", compared)
        return gaps, kinds

    return watch


def trained_on_policy(trained):
    """Train; the ratio of the one minibatch of each update is 1, whatever was updated before."""
    del trained.state.log_history[:]
    trained.train()
    ratios, kls = metric(trained, "val/ratio"), metric(trained, "policy/approxkl_avg")
    assert len(ratios) == 2
    return max(abs(r - 1) for r in ratios), max(kls)


@pytest.mark.parametrize("order", ["with the fused log-prob", "the fused log-prob came later", "without it"])
def test_the_ratio_starts_at_one_and_samples_are_of_the_trained_weights(order, trainer, watched):
    patch(logprob=order == "with the fused log-prob")
    if order == "the fused log-prob came later":
        patch(logprob=True)
    before = [p.detach().clone() for p in trainer.model.policy.parameters()]
    gaps, kinds = watched(trainer)
    drift, kl = trained_on_policy(trainer)
    assert any(not torch.equal(p, b) for p, b in zip(trainer.model.policy.parameters(), before, strict=True))
    assert drift < 1e-4
    assert kl < 1e-8
    assert len(gaps) == 16
    assert max(gaps) < ROUNDING, gaps
    assert (kinds == {torch.Tensor}) == (order == "without it"), kinds


def test_a_rollout_is_measured_before_it_gives_its_cache_up(trainer, monkeypatch):
    from trl_turbo.patches.memory import steps

    patch()
    found = []
    llm = trainer.vllm_generation.llm
    release = llm.release
    monkeypatch.setattr(llm, "release", lambda: found.append("released") or release())
    monkeypatch.setattr(steps, "measure", lambda who, phase: found.append(phase))
    trainer.train()
    rollouts = [at for at, event in enumerate(found) if event == "released"]
    assert rollouts
    assert all(found[at - 1] == "rollout" for at in rollouts), found
    assert "training" in found


@pytest.mark.parametrize("left", ["logprob", "rollout"])
def test_either_patch_goes_and_leaves_the_other(left, trainer, monkeypatch):
    from trl_turbo.patches.logprob.scored import ScoredLogits

    patch(logprob=True)
    patch(logprob=left == "logprob", rollout=left == "rollout")
    asked, kinds = [], set()
    generate, pick = trainer.vllm_generation.generate, module.selective_log_softmax
    monkeypatch.setattr(trainer.vllm_generation, "generate", lambda *a: asked.append(a) or generate(*a))
    monkeypatch.setattr(module, "selective_log_softmax", lambda z, index: kinds.add(type(z)) or pick(z, index))
    drift, _ = trained_on_policy(trainer)
    assert drift < 1e-4
    assert bool(asked) == (left == "rollout")
    assert kinds == {ScoredLogits if left == "logprob" else torch.Tensor}


def test_control_scores_of_other_weights_part(trainer, monkeypatch):
    patch()
    score = rollout._Scores.__getitem__

    def stale(self, rows):
        with torch.no_grad():
            for parameter in self.generation.model.parameters():
                parameter.mul_(1.05)
        try:
            return score(self, rows)
        finally:
            with torch.no_grad():
                for parameter in self.generation.model.parameters():
                    parameter.div_(1.05)

    monkeypatch.setattr(rollout._Scores, "__getitem__", stale)
    drift, kl = trained_on_policy(trainer)
    assert drift > 1e-3
    assert kl > 1e-5


@pytest.mark.parametrize("stop", ["none", "one token", "two tokens"])
def test_a_rollout_is_what_transformers_gives(stop, trainer, monkeypatch):
    """Greedily: the same tokens, ended and padded in the same way, and the same log-probs of them."""
    from transformers import GenerationConfig

    policy = trainer.model.policy
    queries = next(iter(trainer.dataloader))["input_ids"]
    start = queries.shape[1]

    def by_transformers():
        config = GenerationConfig(max_new_tokens=12, do_sample=False)
        return module.batch_generation(policy, queries, 3, 0, config)

    monkeypatch.setattr(policy.generation_config, "eos_token_id", None)
    unstopped = by_transformers()[0]
    early, late = unstopped[0, start + 3].item(), unstopped[1, start + 9].item()
    ends = {"none": None, "one token": early, "two tokens": [early, late]}
    monkeypatch.setattr(policy.generation_config, "eos_token_id", ends[stop])
    expected, scores = by_transformers()
    assert torch.equal(expected, unstopped) == (stop == "none")
    expected_log_probs = module.selective_log_softmax(scores, expected[:, start:])

    patch(logprob=False)
    token = rollout._GENERATION.set(trainer.vllm_generation)
    try:
        cold = GenerationConfig(max_new_tokens=12, temperature=0.0)
        found, scores = module.batch_generation(policy, queries, 3, 0, cold)
    finally:
        rollout._GENERATION.reset(token)
    assert torch.equal(found, expected)
    unscaled = dataclasses.replace(scores, temperature=1.0)
    log_probs = torch.cat(
        [module.selective_log_softmax(unscaled[i : i + 3], found[i : i + 3, start:]) for i in (0, 3, 6)]
    )
    real = found[:, start:] != 0
    assert (log_probs - expected_log_probs)[real].abs().max() < 1e-4


def test_shown_samples_come_from_the_engine_too(trainer, monkeypatch):
    patch()
    asked = []
    generate = trainer.vllm_generation.generate
    monkeypatch.setattr(trainer.vllm_generation, "generate", lambda *a: asked.append(len(a[0])) or generate(*a))
    monkeypatch.setattr(trainer.model.policy, "generate", None)
    trainer.generate_completions(sampling=True)
    assert asked == [trainer.eval_dataloader.batch_sampler.batch_size]


def test_the_reward_rises_and_a_saved_policy_is_the_trained_one(tmp_path, trainer, monkeypatch):
    """Last of those that share the trainer: the engines that come after take its process groups with them."""
    from transformers import AutoModelForCausalLM

    patch()
    trainer.model.load_state_dict(trainer.untrained)
    trainer.optimizer.optimizer.state.clear()
    for group in trainer.optimizer.param_groups:
        group["lr"] = 3e-3
    monkeypatch.setattr(trainer.lr_scheduler, "step", lambda: None)
    monkeypatch.setattr(trainer.args, "num_total_batches", 40)
    monkeypatch.setattr(trainer.args, "kl_coef", 0.0)
    torch.manual_seed(1)
    torch.nn.init.normal_(trainer.reward_model.score.weight, std=0.2)
    del trainer.state.log_history[:]
    trainer.train()
    scores = metric(trainer, "objective/scores")
    assert sum(scores[-10:]) / 10 > sum(scores[:10]) / 10 + 0.5, scores

    trainer.save_model(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    trained = trainer.model.policy.state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())


def test_an_adapter_is_pushed_before_each_rollout(tmp_path, watched, monkeypatch):
    from trl_turbo.engine.adapter import ServedAdapter

    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    report = patch()
    trained = ppo(tmp_path, peft_config=config, learning_rate=5e-2)
    try:
        assert any("served unmerged" in note for note in notes(report))
        gaps, _ = watched(trained)
        drift, kl = trained_on_policy(trained)
        assert drift < 1e-4
        assert kl < 1e-8
        assert max(gaps) < ROUNDING, gaps
        assert any(p.abs().sum() > 0 for n, p in trained.model.policy.named_parameters() if "lora_B" in n)

        monkeypatch.setattr(ServedAdapter, "push", lambda self: None)
        gaps.clear()
        trained_on_policy(trained)
        assert max(gaps) > 10 * ROUNDING, gaps  # control: samples of an old adapter
    finally:
        shut_down(trained.vllm_generation.llm)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"generation": {"repetition_penalty": 1.1}}, "repetition_penalty=1.1"),
        ({"dora": True}, "DoRA"),
        ({"subclass": True}, "it overrides train"),
    ],
)
def test_what_is_declined_samples_with_transformers_and_says_why(change, words, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    report = patch()
    change = dict(change)
    if change.pop("dora", False):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
        change["peft_config"] = config
    if change.pop("subclass", False):
        own = type("Own", (module.PPOTrainer,), {"train": lambda self: module.PPOTrainer.train(self)})
        monkeypatch.setattr("trl.experimental.ppo.PPOTrainer", own)
    trained = ppo(tmp_path, total_episodes=8, **change)
    assert not hasattr(trained, "vllm_generation")
    assert len(notes(report)) == 1
    assert words in notes(report)[0]
    assert "transformers samples, as the script says" in notes(report)[0]
    trained.train()
    assert len(metric(trained, "val/ratio")) == 1


def test_the_script_may_keep_transformers_and_unpatched_is_stock(tmp_path):
    import trl_turbo

    assert "rollout.ppo" not in patch(rollout="script")
    trl_turbo.unpatch()
    original = module.batch_generation, module.PPOTrainer.train
    assert patch()["rollout.ppo"].status == "applied"
    assert module.batch_generation is not original[0]
    trl_turbo.unpatch()
    assert (module.batch_generation, module.PPOTrainer.train) == original
