"""`trl_turbo.from_pretrained`: one copy of a checkpoint for transformers and vLLM, and `model.fast_generate`."""

from __future__ import annotations

import copy
import gc
import importlib.util
from types import SimpleNamespace

import pytest
import torch

import trl_turbo
from tests.engine.conftest import shut_down
from tests.engine.greedy import PROMPTS, TOKENS, by_transformers, train
from tests.engine.models import saved
from tests.engine.trainers import metric
from tests.engine.trainers import trainer as make_trainer
from trl_turbo.engine.errors import EngineDeclinedError

pytestmark = pytest.mark.usefixtures("one_process")
vllm_only = pytest.mark.vllm
GAP = "sampling/sampling_logp_difference/mean"
RANK = 8


def by_fast_generate(model):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    outputs = model.fast_generate([list(p) for p in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def agrees(model):
    return by_fast_generate(model) == by_transformers(model)


def lora(**settings):
    peft = pytest.importorskip("peft")
    wanted = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return peft.LoraConfig(**{**wanted, **settings})


def wrapped(model, **settings):
    from peft import get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, lora(**settings))


def same(model, expected):
    """Whether two models are the same in all that `from_pretrained` decides, values included."""
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    for (name, buffer), (other, wanted) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, wanted), name
        assert (buffer.dtype, buffer.device) == (wanted.dtype, wanted.device), name
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [n for n, _ in expected.named_parameters()]
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert (model.name_or_path, model.config.name_or_path) == (expected.name_or_path, expected.config.name_or_path)
    assert (type(model), model.dtype, model.training) == (type(expected), expected.dtype, expected.training)
    assert model.config._attn_implementation == expected.config._attn_implementation
    public = {n: str(v) for n, v in vars(expected).items() if not n.startswith("_")}
    assert {n: str(v) for n, v in vars(model).items() if n in public} == public


# -- without vLLM: what every supported transformers does ------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_tied", "llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_values_is_else_what_transformers_loads(family, dtype, tmp_path):
    from transformers import AutoModelForCausalLM, GenerationConfig

    from trl_turbo.engine.pretrained import without_values

    saved(tmp_path, family, dtype=dtype)
    GenerationConfig(temperature=0.7, top_k=5, max_new_tokens=9, do_sample=True, eos_token_id=[1, 7]).save_pretrained(
        tmp_path
    )
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    model = without_values(str(tmp_path), "auto", {})
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), expected.parameters(), strict=True):
            parameter.copy_(values)  # what vLLM does
    same(model, expected)
    ids = torch.tensor([[5, 9, 13, 17]])
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_a_model_without_values_takes_no_memory(tmp_path):
    from trl_turbo.engine.pretrained import without_values

    saved(tmp_path, "llama")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tmp_path)
    config.update({"hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 8192, "num_hidden_layers": 8})
    config.save_pretrained(tmp_path)
    before = resident_bytes()
    model = without_values(str(tmp_path), torch.float32, {})
    took = resident_bytes() - before
    total = sum(p.nbytes for p in model.parameters())
    assert total > 1 << 30
    assert took < total / 10, f"{took} of {total} bytes"
    largest = max(model.parameters(), key=lambda p: p.nbytes)
    largest.data.zero_()
    assert resident_bytes() - before - took > 0.9 * largest.nbytes  # control: what is written does count


def resident_bytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def test_what_cannot_be_loaded_so_is_told_in_a_sentence(tmp_path):
    from transformers import AutoConfig

    from trl_turbo.engine.pretrained import without_values

    saved(tmp_path, "qwen2_tied")
    with pytest.raises(TypeError, match="device_map is for transformers' loading, and with fast_inference=True vLLM"):
        without_values(str(tmp_path), "auto", {"device_map": "auto"})
    with pytest.raises(TypeError, match="gpu_memory_utilization sizes an engine that loads the weights itself"):
        trl_turbo.from_pretrained(str(tmp_path), gpu_memory_utilization=0.5)
    with pytest.raises(TypeError, match="vllm_kwargs has load_format, which follows from the other arguments"):
        trl_turbo.from_pretrained(str(tmp_path), vllm_kwargs={"load_format": "dummy"})
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(EngineDeclinedError, match="the model is quantised"):
        without_values(str(tmp_path), torch.float32, {})
    del config.quantization_config
    config.dtype = config.torch_dtype = None
    config.save_pretrained(tmp_path)
    with pytest.raises(EngineDeclinedError, match=r"pass dtype=torch\.bfloat16"):
        without_values(str(tmp_path), "auto", {})


def test_without_vllm_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    saved(tmp_path, "qwen2_tied")
    with pytest.raises(ImportError, match=r"fast_inference=True needs vLLM, .*; pip install 'trl-turbo\[vllm\]'"):
        trl_turbo.from_pretrained(str(tmp_path), fast_inference=True)
    model, _ = trl_turbo.from_pretrained(str(tmp_path))
    with pytest.raises(ImportError, match=r"fast_generate needs vLLM, .*; pip install 'trl-turbo\[vllm\]'"):
        model.fast_generate("x")


def test_prompts_of_every_kind():
    from trl_turbo.engine.fast_generate import vllm_prompts

    class Tokenizer:
        def apply_chat_template(self, messages, **settings):
            assert settings == {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
            return [len(message["content"]) for message in messages]

    chat = [{"role": "system", "content": "ab"}, {"role": "user", "content": "abc"}]
    ids, talk = {"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [2, 3]}
    for given, wanted in (("a", ["a"]), (["a", "b"], ["a", "b"]), ([5, 6], [ids]), ([[5, 6], "a"], [ids, "a"])):
        assert vllm_prompts(given, Tokenizer()) == wanted
    assert vllm_prompts(chat, Tokenizer()) == [talk]
    assert vllm_prompts([chat, [5, 6]], Tokenizer()) == [talk, ids]
    assert vllm_prompts([], Tokenizer()) == []
    with pytest.raises(TypeError, match=r"prompts is a int; pass texts, chats"):
        vllm_prompts(5, Tokenizer())
    for wrong in (["a", None], [[]], [[1, 2.0]], [{"content": "a"}], [[True]]):
        with pytest.raises(TypeError, match=r"a prompt is .*; pass texts, chats"):
            vllm_prompts(wrong, Tokenizer())


def test_an_engine_smaller_than_the_work_is_told_in_sentences():
    from trl_turbo.engine.sizing import Work, shortfalls

    work = Work(sequences=8, completion_tokens=64, prompt_tokens=64)
    assert shortfalls(work, {}, max_model_len=128, max_num_seqs=8, cached_tokens=1024) == ()
    (told,) = shortfalls(work, {"max_model_len": 512}, max_model_len=256, max_num_seqs=8, cached_tokens=4096)
    assert "up to 256 tokens and the trainer asks for 512" in told
    assert "max_seq_length=512" in told
    (told,) = shortfalls(work, {}, max_model_len=128, max_num_seqs=4, cached_tokens=1024)
    assert "max_num_seqs=8" in told
    (told,) = shortfalls(work, {}, max_model_len=128, max_num_seqs=8, cached_tokens=1023)
    assert "holds 1023 tokens and the rollout would fill 1024" in told


# -- vLLM first: one engine for all that follows; each test leaves a model that agrees with its engine ---------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("model")
    saved(folder, "qwen2_tied", initializer_range=0.05)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    model, tokenizer = trl_turbo.from_pretrained(
        str(folder), fast_inference=True, max_lora_rank=RANK, max_num_seqs=8, max_seq_length=128
    )
    kept = SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        llm=model.fast_generate.llm,
        expected=expected,
        pointers={n: p.data_ptr() for n, p in model.named_parameters()},
    )
    yield kept
    shut_down(kept.llm)
    # Now, and not while an engine of the next module starts, whose process groups it would take along
    vars(kept).clear()
    del model, tokenizer, expected
    gc.collect()


@pytest.fixture
def fast(engine):
    """The model as it was loaded, whatever the test before did to it; its memory stays where it is."""
    engine.model.load_state_dict(engine.expected.state_dict())
    engine.model.requires_grad_().eval()
    return engine


def owned_by_vllm(llm):
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    storages = [p.untyped_storage() for p in model.parameters()]
    return {s.data_ptr(): s.nbytes() for s in storages}


@vllm_only
def test_it_is_the_model_that_transformers_loads_in_vllms_memory(engine):
    """The first test of the engine, and without the reset: these are the values that vLLM read."""
    import vllm

    fast = engine
    assert isinstance(fast.llm, vllm.LLM)
    same(fast.model, fast.expected)
    ids = torch.tensor([[5, 9, 13, 17]])
    assert torch.equal(fast.model(ids).logits, fast.expected(ids).logits)
    assert fast.model.lm_head.weight is fast.model.model.embed_tokens.weight
    owned = owned_by_vllm(fast.llm)
    assert all(p.untyped_storage().data_ptr() in owned for p in fast.model.parameters())
    report = fast.llm.memory_report()
    assert report.shared_bytes == sum(p.nbytes for p in fast.model.parameters())
    assert report.copied_bytes == 0
    assert sum(owned.values()) < 1.2 * report.shared_bytes  # vLLM has padding, and no second copy


@vllm_only
def test_it_samples_from_the_weights_of_the_moment(fast, tmp_path):
    assert agrees(fast.model)
    before = by_fast_generate(fast.model)
    train(fast.model)
    assert agrees(fast.model)
    assert by_fast_generate(fast.model) != before
    fast.model.load_state_dict(fast.expected.state_dict())
    assert by_fast_generate(fast.model) == by_transformers(fast.expected)
    train(fast.model)
    fast.model.save_pretrained(tmp_path)
    trained = type(fast.model).from_pretrained(tmp_path)
    same_values = zip(trained.state_dict().values(), fast.model.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in same_values)
    assert by_fast_generate(fast.model) == by_transformers(trained)
    fast.model.load_state_dict({n: v.clone() for n, v in fast.expected.state_dict().items()}, assign=True)
    fast.model.tie_weights()
    assert by_fast_generate(fast.model) == by_transformers(fast.expected)
    assert {n: p.data_ptr() for n, p in fast.model.named_parameters()} == fast.pointers  # put back where vLLM reads


@vllm_only
def test_a_copy_is_an_ordinary_model(fast):
    copied = copy.deepcopy(fast.model)
    owned = owned_by_vllm(fast.llm)
    assert not any(p.untyped_storage().data_ptr() in owned for p in copied.parameters())
    before = by_fast_generate(fast.model)
    train(copied)
    assert by_transformers(copied) != before
    assert by_fast_generate(fast.model) == before == by_transformers(fast.model)
    with pytest.raises(RuntimeError, match="a copy has no engine; call fast_generate on the original"):
        copied.fast_generate("x")


@vllm_only
def test_defaults_are_those_of_the_generation_config(fast, monkeypatch):
    asked = []
    generate = fast.llm.generate
    monkeypatch.setattr(fast.llm, "generate", lambda *a, **k: asked.append(a[1]) or generate(*a, **k), raising=False)
    text = "12+7="
    chat = [{"role": "user", "content": text}]
    fast.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for name, value in {"temperature": 0.5, "top_k": 1, "max_new_tokens": 6, "do_sample": True}.items():
        monkeypatch.setattr(fast.model.generation_config, name, value)
    by_text, by_ids, by_chat = fast.model.fast_generate([text, fast.tokenizer(text).input_ids, chat], use_tqdm=False)
    assert (asked[0].temperature, asked[0].top_k, asked[0].max_tokens) == (0.5, 1, 6)
    answers = [list(output.outputs[0].token_ids) for output in (by_text, by_ids, by_chat)]
    assert answers[0] == answers[1] == answers[2]  # top_k=1 is greedy
    assert by_text.outputs[0].text


@vllm_only
@pytest.mark.parametrize("way", ["served", "merged"])
def test_an_adapter_that_comes_later_is_used_and_one_that_goes_is_not(way, fast, monkeypatch):
    monkeypatch.setenv("TRL_TURBO_ROLLOUT_ADAPTER", way)
    monkeypatch.setattr(
        "trl_turbo.engine.merged.LOG_SHARE", 9
    )  # a float32 base loses much to rounding, and is put back
    model = wrapped(fast.model)
    assert agrees(model)
    assert (fast.llm.shared.fold is not None) == (way == "merged")
    train(model, lr=1e-3)
    assert agrees(model)
    with model.disable_adapter():
        without = by_fast_generate(model)
        assert without == by_transformers(model)
    assert by_fast_generate(model) == by_transformers(model) != without

    # Fewer and smaller matrices than the first: what that left in vLLM's buffers must not show
    model.add_adapter("small", lora(r=2, target_modules=["q_proj"]))
    model.set_adapter("small")
    assert agrees(model)
    assert by_fast_generate(model) != without
    model.set_adapter("default")
    assert agrees(model)
    model.merge_adapter()
    assert agrees(model)
    model.unmerge_adapter()
    assert agrees(model)

    merged = model.merge_and_unload()
    assert merged is fast.model
    assert agrees(merged)
    assert by_fast_generate(merged) != without
    assert fast.llm.shared.adapter is None


@vllm_only
def test_a_merge_that_rebinds_is_noticed(fast):
    merged = wrapped(fast.model).merge_and_unload(safe_merge=True)
    assert agrees(merged)
    assert {n: p.data_ptr() for n, p in merged.named_parameters()} == fast.pointers


@vllm_only
def test_control_an_adapter_that_is_not_followed_is_missed(fast, monkeypatch):
    from trl_turbo.engine.shared import SharedEngine

    by_fast_generate(fast.model)
    with monkeypatch.context() as patch:
        patch.setattr(SharedEngine, "_follow", lambda self: None)
        model = wrapped(fast.model)
        assert not agrees(model)
    assert agrees(model)
    model.unload()
    assert agrees(fast.model)


@vllm_only
def test_an_adapter_without_room_is_told(fast):
    model = wrapped(fast.model, r=2 * RANK)
    with pytest.raises(EngineDeclinedError, match=f"has rank 16 and the engine was started with max_lora_rank={RANK}"):
        by_fast_generate(model)
    model.unload()
    model = wrapped(fast.model, use_dora=True)
    with pytest.raises(EngineDeclinedError, match="DoRA"):
        by_fast_generate(model)
    model.unload()
    assert agrees(fast.model)


@vllm_only
def test_the_cache_stays_released_where_somebody_released_it(fast, monkeypatch):
    calls = []
    import vllm

    monkeypatch.setattr(vllm.LLM, "sleep", lambda self, level: calls.append("sleep"))
    monkeypatch.setattr(vllm.LLM, "wake_up", lambda self, tags=None: calls.append("wake"))
    monkeypatch.setattr(fast.llm.shared, "can_release", True)
    by_fast_generate(fast.model)
    assert calls == []
    fast.llm.release()
    by_fast_generate(fast.model)
    assert calls == ["sleep", "wake", "sleep"]
    fast.llm.wake_up()


@pytest.fixture
def patched(monkeypatch):
    """A patched TRL in which no vLLM starts."""
    import vllm

    report = trl_turbo.patch(logprob=False, rollout=True, verbose=False)

    def refuse(self, *args, **kwargs):
        raise AssertionError("a second engine was started")

    monkeypatch.setattr(vllm.LLM, "__init__", refuse)
    yield report
    trl_turbo.unpatch()


def told(report):
    return [note.text for note in report.notes if note.feature == "rollout"]


@vllm_only
@pytest.mark.trl
@pytest.mark.parametrize(("kind", "use_vllm"), [("GRPO", True), ("GRPO", False), ("RLOO", True), ("OnlineDPO", True)])
def test_trainers_sample_from_the_models_engine(kind, use_vllm, fast, tmp_path, patched):
    import vllm

    loaded = (fast.model, fast.tokenizer)
    trained = make_trainer(kind, tmp_path, loaded=loaded, max_steps=3, use_vllm=use_vllm, learning_rate=1e-2)
    llm = trained.vllm_generation.llm if hasattr(trained, "vllm_generation") else trained.llm
    assert isinstance(llm, vllm.LLM)
    assert llm.shared is fast.llm.shared
    trained.train()
    assert trained.state.global_step == 3
    if kind == "GRPO":
        assert max(metric(trained, GAP)) < 1e-3, metric(trained, GAP)
        assert len(metric(trained, GAP)) == 3
    assert fast.model.model.embed_tokens.weight.data_ptr() == fast.pointers["model.embed_tokens.weight"]
    assert not torch.equal(fast.model.model.embed_tokens.weight, fast.expected.model.embed_tokens.weight)
    assert agrees(fast.model)


@vllm_only
@pytest.mark.trl
@pytest.mark.parametrize("way", ["served", "merged"])
def test_a_trainer_with_an_adapter_samples_from_the_models_engine(way, fast, tmp_path, patched, monkeypatch):
    patched = trl_turbo.patch(logprob=False, rollout=True, rollout_adapter=way, verbose=False)
    monkeypatch.setattr("trl_turbo.engine.merged.LOG_SHARE", 9)
    trained = make_trainer(
        "GRPO",
        tmp_path,
        loaded=(fast.model, fast.tokenizer),
        peft_config=lora(r=RANK, lora_alpha=16, init_lora_weights=True),
        max_steps=3,
        learning_rate=2e-2,
        vllm_max_model_length=512,
    )
    assert trained.vllm_generation.llm.shared is fast.llm.shared
    assert sum("up to 128 tokens and the trainer asks for 512" in text for text in told(patched)) == 1
    assert any("folded into the base weights" in text for text in told(patched)) == (way == "merged")
    trained.train()
    assert len(metric(trained, GAP)) == 3
    assert max(metric(trained, GAP)) < 1e-3, metric(trained, GAP)
    assert agrees(trained.model)
    assert (fast.llm.shared.fold is not None) == (way == "merged")
    base = fast.expected.state_dict()
    assert all(
        torch.equal(values, base[name.replace("base_model.model.", "").replace(".base_layer", "")])
        for name, values in trained.model.state_dict().items()
        if "lora_" not in name
    )
    trained.model.unload()
    assert agrees(fast.model)


@vllm_only
@pytest.mark.trl
def test_control_without_the_models_engine_the_trainer_starts_one(fast, tmp_path, patched, monkeypatch):
    from trl_turbo.engine.fast_generate import FastGenerate

    monkeypatch.setattr(FastGenerate, "of", staticmethod(lambda model: None))
    with pytest.raises(AssertionError, match="a second engine was started"):
        make_trainer("GRPO", tmp_path, loaded=(fast.model, fast.tokenizer), max_steps=1)


# -- HF first --------------------------------------------------------------------------------------------------------


@vllm_only
@pytest.mark.trl
def test_without_fast_inference_the_first_call_starts_the_engine(tmp_path, request):
    saved(tmp_path / "model", "llama", initializer_range=0.05)
    model, tokenizer = trl_turbo.from_pretrained(str(tmp_path / "model"), max_lora_rank=RANK, max_num_seqs=8)
    assert model.fast_generate.llm is None
    assert agrees(model)
    llm = model.fast_generate.llm
    request.addfinalizer(lambda: shut_down(llm))
    assert all(p.untyped_storage().data_ptr() in owned_by_vllm(llm) for p in model.parameters())
    train(model)
    assert agrees(model)
    trl_turbo.patch(logprob=False, rollout=True, verbose=False)
    request.addfinalizer(trl_turbo.unpatch)
    loaded = (wrapped(model), tokenizer)
    trained = make_trainer("GRPO", tmp_path, loaded=loaded, max_steps=2, learning_rate=2e-2)
    assert trained.vllm_generation.llm.shared is llm.shared
    trained.train()
    assert max(metric(trained, GAP)) < 1e-3, metric(trained, GAP)
    assert agrees(loaded[0])
    assert agrees(loaded[0].merge_and_unload())


@vllm_only
@pytest.mark.trl
def test_fast_generate_takes_the_engine_that_a_trainer_started(tmp_path, request):
    saved(tmp_path / "model", "qwen2_tied", initializer_range=0.05)
    loaded = trl_turbo.from_pretrained(tmp_path / "model")
    trl_turbo.patch(logprob=False, rollout=True, verbose=False)
    request.addfinalizer(trl_turbo.unpatch)
    trained = make_trainer("RLOO", tmp_path, loaded=loaded, max_steps=2, use_vllm=False, learning_rate=1e-2)
    llm = trained.vllm_generation.llm
    request.addfinalizer(lambda: shut_down(llm))
    trained.train()
    assert loaded[0].fast_generate.llm is llm
    assert agrees(loaded[0])
