"""Layers of a real vLLM model hand over to our kernels while they are asked to, and are as they were afterwards."""

from __future__ import annotations

import pytest
import torch

from tests.engine.models import saved

pytestmark = pytest.mark.vllm


@pytest.fixture
def engine(tmp_path, turbo):
    model, _ = saved(tmp_path, "qwen2_tied", initializer_range=0.05)
    llm = turbo(model)
    assert llm.shared is not None, llm.declined
    return llm


@pytest.fixture
def calls(monkeypatch):
    """What our kernels were asked for: on a CPU they compute the reference, and take any shape here."""
    from trl_turbo.engine import decode_products

    found = []
    monkeypatch.setattr(decode_products, "fits", lambda x, weight: True)
    for name in ("skinny_gated", "skinny_linear"):
        kernel = getattr(decode_products, name)

        def counted(x, *rest, name=name, kernel=kernel):
            found.append((name, len(x)))
            return kernel(x, *rest)

        monkeypatch.setattr(decode_products, name, counted)
    return found


def model_of(llm):
    return llm.llm_engine.model_executor.driver_worker.model_runner.model


def sampled(llm):
    import vllm

    params = vllm.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": list(range(9, 20 + row))} for row in range(3)], params, use_tqdm=False)
    outputs = [o.outputs[0] for o in outputs]
    return [list(o.token_ids) for o in outputs], torch.tensor(
        [[step[token].logprob for step, token in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs]
    )


def test_layers_hand_over_for_few_sequences_that_decode(engine, calls, monkeypatch):
    from trl_turbo.engine import decode_batch
    from trl_turbo.engine.decode import DecodeKernels

    noted = []
    monkeypatch.setattr(decode_batch, "note", lambda _, text: noted.append(text))

    model = model_of(engine)
    ids, logps = sampled(engine)
    kernels = DecodeKernels(model, 16)
    (said,) = kernels.declined  # on a CPU
    assert "decode steps run vLLM's attention" in said
    assert "FlashAttentionImpl is what was looked at" in said
    with kernels.captured():
        ids_ours, logps_ours = sampled(engine)
    assert set(calls) == {("skinny_gated", 3), ("skinny_linear", 3)}  # no prefill
    # The first product of each MLP, and down, qkv and o, in two layers for each token after the first
    assert [calls.count(each) for each in sorted(set(calls))] == [2 * 11, 3 * 2 * 11]
    assert ids_ours == ids
    torch.testing.assert_close(logps_ours, logps, rtol=0, atol=64 * 2**-23 * logps.abs().max().item())
    assert kernels.own_attention == set()
    calls.clear()
    sampled(engine)
    assert not calls
    assert not any("forward" in vars(module) for module in model.modules())

    # A model that does more between the two keeps its own first product
    kind = type(next(module for module in model.modules() if hasattr(module, "act_fn")))

    def forward(self, x):
        gate_up, _ = self.gate_up_proj(x)
        x, _ = self.down_proj(self.act_fn(1.0 * gate_up))
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", forward)
        with DecodeKernels(model, 16).captured():
            sampled(engine)  # what would be the warm-up, of wrong numbers; its second token knows
            calls.clear()
            assert sampled(engine)[0] == ids
        assert {name for name, _ in calls} == {"skinny_linear"}
    assert len(noted) == 2  # one of each layer
    assert "which got something else for its activation than its first product" in noted[0]


def test_a_kernel_is_asked_on_random_numbers_first(monkeypatch):
    from types import SimpleNamespace

    from trl_turbo.engine import decode_probe

    layer = SimpleNamespace(
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        dtype=torch.float16,
        impl=SimpleNamespace(scale=0.25, logits_soft_cap=None),
    )
    before = torch.get_rng_state()
    assert decode_probe.misbehaves(layer, torch.device("cpu")) is None
    assert torch.equal(before, torch.get_rng_state())
    right = decode_probe.paged_decode
    monkeypatch.setattr(decode_probe, "paged_decode", lambda *args, **words: 1.02 * right(*args, **words))
    assert "on random numbers it is off by" in decode_probe.misbehaves(layer, torch.device("cpu"))

    def unable(*_, **__):
        raise RuntimeError("no kernel image\nof many lines")

    monkeypatch.setattr(decode_probe, "paged_decode", unable)
    said = decode_probe.misbehaves(layer, torch.device("cpu"))
    assert said == "it does not run on this device (RuntimeError: no kernel image)"
