"""Bursts give what single steps give: tokens, log-probs and stops, with requests that queue and are preempted."""

from __future__ import annotations

import pytest

from tests.engine.models import saved

pytestmark = pytest.mark.vllm

PROMPTS = [
    [11, 12, 13, 14, 15],
    [40, 41, 42],
    [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17],
    [90, 91],
    [33] * 21,
    [60, 61, 62],
]


def sampled(llm, **settings):
    import vllm

    params = vllm.SamplingParams(**{"temperature": 1.0, "max_tokens": 45, "logprobs": 0, "seed": 4, **settings})
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in PROMPTS], params, use_tqdm=False)
    return [
        (
            list(o.outputs[0].token_ids),
            [round(step[t].logprob, 4) for step, t in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)],
            o.outputs[0].finish_reason,
        )
        for o in outputs
    ]


CASES = {
    "to the limit": {"ignore_eos": True},
    "ends at a token": {"stop_token_ids": list(range(3, 40))},
    "stop string": {"stop": ["a", "<9"], "detokenize": True},
    "penalty": {"repetition_penalty": 1.3, "ignore_eos": True},
    "least": {"min_tokens": 20, "stop_token_ids": list(range(3, 60))},
    "one token": {"max_tokens": 1},
    "greedy": {"temperature": 0.0, "ignore_eos": True},
}


@pytest.fixture
def counted(monkeypatch):
    from trl_turbo.engine import burst

    found = []
    steps = burst.Burst.steps

    def counting(self):
        found.append(self.tokens)
        return steps(self)

    monkeypatch.setattr(burst.Burst, "steps", counting)
    return found


def test_bursts_give_what_single_steps_give(tmp_path, turbo, monkeypatch, counted):
    from trl_turbo.engine import burst
    from trl_turbo.engine.sizing import Work

    model, _ = saved(tmp_path, "qwen2_tied", initializer_range=0.05)
    # 4 at a time of 6, and a cache of some 192 tokens for 4 of up to 66: requests wait, and some are preempted
    llm = turbo(model, work=Work(4, 45, 21), max_num_seqs=4, max_model_len=80, block_size=32, num_gpu_blocks_override=7)
    assert llm.shared is not None, llm.declined
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted = []
    preempt = scheduler._preempt_request
    monkeypatch.setattr(scheduler, "_preempt_request", lambda *a, **k: (preempted.append(a[0]), preempt(*a, **k))[1])
    counted.clear()
    whole = {name: sampled(llm, **case) for name, case in CASES.items()}
    assert max(counted) == burst.TOKENS
    assert counted.count(burst.TOKENS_WITH_QUEUE) > 0
    assert preempted
    counted.clear()
    monkeypatch.setattr(burst, "TOKENS", 1)
    monkeypatch.setattr(burst, "TOKENS_WITH_QUEUE", 1)
    single = {name: sampled(llm, **case) for name, case in CASES.items()}
    assert not counted
    for name in CASES:
        assert whole[name] == single[name], name
    reasons = {reason for _, _, reason in whole["ends at a token"]}
    assert "stop" in reasons  # a stop inside a burst was met
