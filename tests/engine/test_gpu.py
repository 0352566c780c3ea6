"""The engine on a GPU: CUDA graphs over shared weights, a cache that comes and goes, adapters served and merged."""

from __future__ import annotations

import pytest
import torch

from tests.engine.gpu import graphs
from tests.engine.models import saved

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: `tox run -e gpu` needs one", allow_module_level=True)
pytest.importorskip("peft")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_adapter(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=ALL))


def prepared(folder, adapter):
    model, _ = saved(
        folder,
        "qwen2_tied",
        dtype=torch.bfloat16,
        hidden_size=256,
        intermediate_size=512,
        initializer_range=0.05,
        max_position_embeddings=1024,
    )
    model = model.cuda()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    return (with_adapter(model) if adapter else model), frozen


def step(model):
    """An optimizer step's worth of change, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))


def gap_of(llm):
    return llm.shared.compare(llm._sample)


def free():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize("way", ["full", "served", "merged"])
def test_an_engine_with_graphs_follows_training(way, tmp_path, turbo, monkeypatch):
    from trl_turbo.engine.sizing import Work

    monkeypatch.setenv("TRL_TURBO_ROLLOUT_ADAPTER", "served" if way == "full" else way)
    model, frozen = prepared(tmp_path, adapter=way != "full")
    llm = turbo(model, work=Work(4, 512, 256), kv_cache_memory_bytes=1 << 30)
    assert llm.shared is not None, llm.declined
    assert len(llm.shared.weights) == len(frozen)
    report = llm.memory_report()
    assert graphs(llm) > 0
    assert (report.lora_bytes > 0) == (way != "full")
    before = gap_of(llm)
    for _ in range(3):
        step(model)
        llm.refresh()
        gap = gap_of(llm)
        assert gap.reason is None, gap
    if way == "served":
        step(model)
        assert gap_of(llm).mean > 3 * before.mean  # control: not pushed
    if way == "merged":
        base = {
            n.removeprefix("base_model.model.").replace(".base_layer", ""): p
            for n, p in model.named_parameters()
            if "lora_" not in n
        }
        assert all(torch.equal(base[n], p) for n, p in frozen.items())


def test_an_fp8_cache_costs_what_the_report_says(tmp_path, turbo):
    import trl_turbo
    from trl_turbo.engine.sizing import Work, plan

    report = trl_turbo.patch(logprob=False, rollout=True, rollout_kv_cache_dtype="fp8", verbose=False)
    try:
        model, _ = prepared(tmp_path, adapter=False)
        llm = turbo(model, work=Work(4, 512, 256))
        assert llm.shared is not None, llm.declined
        assert llm.llm_engine.vllm_config.cache_config.cache_dtype.startswith("fp8")
        whole = plan(model.config, Work(4, 512, 256), {"max_num_seqs": 4}, itemsize=2).kv_bytes
        assert 2 * llm.memory_report().kv_bytes == pytest.approx(whole, rel=0.01)
        assert any("the KV cache is fp8" in note.text for note in report.notes)
        step(model)
        llm.refresh()
        gap = gap_of(llm)
        assert gap.reason is None, gap
    finally:
        trl_turbo.unpatch()


def test_the_cache_goes_and_comes_back_and_the_weights_stay(tmp_path, turbo):
    model, _ = prepared(tmp_path, adapter=False)
    llm = turbo(model, kv_cache_memory_bytes=1 << 30)
    assert llm.shared is not None, llm.declined
    pointers = [p.data_ptr() for p in model.parameters()]
    awake = free()
    llm.sleep(level=2)
    asleep = free()
    assert asleep - awake > 0.9 * (1 << 30)
    values = [p.detach().clone() for p in model.parameters()]
    step(model)  # training goes on meanwhile
    assert not all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    llm.wake_up(tags=["weights"])
    assert free() - awake > 0.9 * (1 << 30)
    llm.refresh()
    gap = gap_of(llm)
    assert gap.reason is None, gap
    assert abs(free() - awake) < 0.1 * (1 << 30)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def sampled(llm, **settings):
    """Token ids and log-probs of eight sequences that stay together."""
    import vllm

    params = vllm.SamplingParams(
        **{"max_tokens": 90, "ignore_eos": True, "logprobs": 0, "detokenize": False, **settings}
    )
    prompts = [{"prompt_token_ids": [(7 * i + 13 * row) % 200 + 8 for i in range(20)]} for row in range(8)]
    outputs = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
    ids = [list(o.token_ids) for o in outputs]
    return ids, torch.tensor([[s[t].logprob for s, t in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs])


def test_bursts_give_what_single_steps_give(tmp_path, turbo, monkeypatch):
    from trl_turbo.engine import burst, lean
    from trl_turbo.engine.sizing import Work

    model, _ = prepared(tmp_path, adapter=False)
    llm = turbo(model, work=Work(8, 90, 20), max_num_seqs=8, max_model_len=128)
    assert llm.shared is not None, llm.declined
    lengths = []
    run = lean.LeanSteps.run
    monkeypatch.setattr(lean.LeanSteps, "run", lambda self, first, n: (lengths.append(n), run(self, first, n))[1])
    ways = ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "seed": 6, "top_k": 20})
    in_bursts = [sampled(llm, **way) for way in ways]
    assert lengths.count(burst.TOKENS) >= 3 * 4
    lengths.clear()
    monkeypatch.setattr(burst, "TOKENS", 1)
    monkeypatch.setattr(burst, "TOKENS_WITH_QUEUE", 1)
    one_by_one = [sampled(llm, **way) for way in ways]
    assert not lengths
    for (ids, logps), (ids_1, logps_1) in zip(in_bursts, one_by_one, strict=True):
        assert ids == ids_1
        torch.testing.assert_close(logps, logps_1, rtol=0, atol=32 * 2**-23)


def test_a_stop_inside_a_burst_is_the_last_token(tmp_path, turbo):
    import vllm

    model, _ = prepared(tmp_path, adapter=False)
    llm = turbo(model)
    params = vllm.SamplingParams(
        temperature=1.0, max_tokens=200, ignore_eos=True, stop_token_ids=list(range(100, 110)), detokenize=False
    )
    outputs = [o.outputs[0] for o in llm.generate([{"prompt_token_ids": [9, 10, 11]}] * 12, params, use_tqdm=False)]
    for output in outputs:  # 12 requests, 4 at a time
        stops = [100 <= token < 110 for token in output.token_ids]
        assert output.finish_reason == "stop"
        assert stops.index(True) == len(stops) - 1
