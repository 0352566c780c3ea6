"""What a vLLM lacks is left out, or the engine is declined in one sentence: its modules never reach the script."""

from __future__ import annotations

import importlib
import sys

import pytest

from tests.engine.greedy import by_transformers, by_vllm, train
from tests.engine.models import saved
from tests.engine.trainers import metric
from tests.engine.trainers import trainer as make_trainer

pytestmark = pytest.mark.vllm


@pytest.fixture
def hidden(monkeypatch):
    """Make modules fail to import as if vLLM had none of that name, and import anew what stands on them."""

    def hide(*names, anew=()):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)
        for name in anew:
            monkeypatch.delitem(sys.modules, name, raising=False)
            parent, _, leaf = name.rpartition(".")
            if parent in sys.modules:
                monkeypatch.delattr(sys.modules[parent], leaf, raising=False)

    return hide


@pytest.fixture
def report():
    import trl_turbo

    yield trl_turbo.patch(logprob=False, rollout=True, verbose=False)
    trl_turbo.unpatch()


def notes(report):
    return [note.text for note in report.notes if note.feature == "rollout"]


def test_the_gpu_worker_needs_nothing_of_the_second_gpu_runner(hidden):
    """vLLM 0.12 has no `vllm.v1.worker.gpu.sample.output`."""
    import vllm.v1.worker.gpu_worker  # noqa: F401 -- it looks for that module itself in later ones

    ours = ("trl_turbo.engine.lean", "trl_turbo.engine.worker")
    hidden("vllm.v1.worker.gpu.sample.output", anew=ours)
    worker = importlib.import_module("trl_turbo.engine.worker")
    reason = object.__new__(worker.SharedWorker)._take_lean_steps()
    assert "vllm.v1.worker.gpu.sample.output" in reason


def test_without_bursts_the_engine_shares_and_says_so(tmp_path, turbo, report, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    from trl_turbo.engine import abilities

    class Older:  # as in vLLM 0.12 to 0.22
        def __init__(self):
            self.num_output_placeholders = 0

    with monkeypatch.context() as older:
        older.setattr("vllm.v1.request.Request", Older)
        reason = abilities.unburstable()
    monkeypatch.setattr(abilities, "unburstable", lambda: reason)
    model, _ = saved(tmp_path, "qwen2_tied")
    llm = turbo(model)
    assert llm.shared is not None, llm.declined
    assert type(llm.llm_engine.engine_core.engine_core.scheduler) is Scheduler
    assert "bursts of tokens need a later vLLM: its requests have no num_in_flight_tokens" in notes(report)[0]
    train(model)
    llm.refresh()
    assert by_vllm(llm) == by_transformers(model)


def test_a_vllm_that_does_not_fit_its_length_gets_one(tmp_path, turbo, monkeypatch):
    from vllm.v1.core import kv_cache_utils

    monkeypatch.delattr(kv_cache_utils, "_auto_fit_max_model_len")
    llm = turbo(saved(tmp_path, "qwen2_tied")[0])
    assert llm.shared is not None, llm.declined
    assert llm.llm_engine.model_config.max_model_len == 256


@pytest.mark.parametrize(
    ("missing", "anew"),
    [
        ("vllm.model_executor.model_loader.base_loader", ("trl_turbo.engine.loader",)),
        ("vllm.v1.worker.cpu_worker", ("trl_turbo.engine.cpu_worker",)),
        ("vllm.lora.lora_weights", ()),
    ],
)
def test_what_cannot_be_built_leaves_the_script_its_own_way(
    missing, anew, tmp_path, report, hidden, one_process, monkeypatch
):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    import trl_turbo.engine.adapter
    import trl_turbo.engine.start  # noqa: F401 -- what is hidden is not what these find

    hidden(missing, anew=anew)
    trained = make_trainer("GRPO", tmp_path, max_steps=1, use_vllm=False, peft_config=config)
    assert not trained.use_vllm
    said = [note for note in notes(report) if "the engine cannot be built with vLLM" in note]
    assert len(said) == 1, notes(report)
    assert missing in said[0]
    assert "install the newest vLLM that this TRL supports" in said[0]
    assert said[0].endswith("transformers samples, as the script says")
    trained.train()
    assert len(metric(trained, "reward")) == 1


def test_a_compilation_configuration_has_only_what_vllm_knows(monkeypatch):
    from types import SimpleNamespace

    import vllm.config

    from trl_turbo.engine.abilities import compilation

    given = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_specialize_lora": False}
    assert compilation(given) == given
    older = SimpleNamespace(__dataclass_fields__={"level": None, "cudagraph_mode": None})  # as in vLLM 0.11
    monkeypatch.setattr(vllm.config, "CompilationConfig", older)
    assert compilation(given) == {"level": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
