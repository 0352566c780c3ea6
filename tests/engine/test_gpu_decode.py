"""Our kernels inside vLLM's graphs of small decode batches: what they sample from is the trainer's model."""

from __future__ import annotations

import pytest
import torch

from tests.engine.models import FAMILIES, saved

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: `tox run -e gpu` needs one", allow_module_level=True)


@pytest.fixture
def every_kernel(monkeypatch):
    """Those too that a tiny model would be faster without."""
    from trl_turbo.engine.decode_products import Products

    monkeypatch.setattr(Products, "_wins", lambda *_: True)


def started(folder, turbo, family="qwen2_tied"):
    from trl_turbo.engine.sizing import Work

    head = {} if family.startswith(("qwen2", "phi3")) else {"head_dim": 64}
    window = {"sliding_window": 32} if family in ("gemma2", "mistral") else {}
    model, _ = saved(
        folder,
        family,
        dtype=torch.bfloat16,
        hidden_size=256,
        intermediate_size=512,
        initializer_range=0.05,
        max_position_embeddings=512,
        **head,
        **window,
    )
    model = model.cuda()
    return model, turbo(model, work=Work(8, 90, 20), max_num_seqs=8, max_model_len=128)


def gaps(model, llm):
    """How far log-probs of what eight sequences sampled are from the exact ones: vLLM's, and the model's own."""
    import vllm

    params = vllm.SamplingParams(temperature=1.0, max_tokens=90, ignore_eos=True, logprobs=0, detokenize=False, seed=3)
    prompts = [[(7 * i + 13 * row) % 200 + 8 for i in range(20 - row)] for row in range(8)]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    exact = model.__class__(model.config).cuda().float()
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    found = []
    for prompt, output in zip(prompts, (o.outputs[0] for o in outputs), strict=True):
        ids = list(output.token_ids)
        sampled = torch.tensor([s[t].logprob for s, t in zip(output.logprobs, ids, strict=True)])
        whole = torch.tensor([[*prompt, *ids]], device="cuda")
        with torch.no_grad():
            truth, own = (
                m.eval()(whole)
                .logits[0, len(prompt) - 1 : -1]
                .float()
                .log_softmax(-1)
                .gather(1, whole[0, len(prompt) :, None])
                for m in (exact, model)
            )
        found.append(((sampled - truth[:, 0].cpu()).abs(), (own - truth)[:, 0].abs().cpu()))
    return tuple(map(torch.stack, zip(*found, strict=True)))


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_the_models(family, tmp_path, turbo, every_kernel):
    model, llm = started(tmp_path, turbo, family)
    assert llm.shared is not None, llm.declined
    worker = llm.llm_engine.model_executor.driver_worker
    assert worker.kernels.declined == ()
    assert worker.kernels.own_attention == {1, 2, 4, 8}
    assert not any("forward" in vars(module) for module in worker.model_runner.model.modules())
    sampled, own = gaps(model, llm)
    # Both round each layer to bf16, the model as a whole sequence and vLLM token by token
    assert sampled.mean() <= 1.5 * own.mean(), (sampled.mean(), own.mean())
    assert sampled.max() <= 3 * own.max(), (sampled.max(), own.max())


def test_off_is_off(tmp_path, turbo, monkeypatch):
    monkeypatch.setenv("TRL_TURBO_ROLLOUT_KERNELS", "off")
    _, llm = started(tmp_path, turbo)
    assert llm.llm_engine.model_executor.driver_worker.kernels is None


@pytest.mark.parametrize("kernel", ["paged_decode", "skinny_gated", "skinny_linear"])
def test_a_wrong_kernel_is_found_at_the_start(kernel, tmp_path, turbo, every_kernel, monkeypatch):
    from trl_turbo.engine import decode_attention, decode_products
    from trl_turbo.engine.llm import EngineDeclinedError

    module = decode_attention if kernel == "paged_decode" else decode_products
    right = getattr(module, kernel)
    monkeypatch.setattr(module, kernel, lambda *args, **words: -right(*args, **words))
    with pytest.raises(EngineDeclinedError, match="log-prob"):
        started(tmp_path, turbo)
