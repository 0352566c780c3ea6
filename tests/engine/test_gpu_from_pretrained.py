"""`from_pretrained(fast_inference=True)` on a GPU: one bf16 copy at its peak, CUDA graphs, adapters, a trainer."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.engine.conftest import shut_down
from tests.engine.gpu import graphs
from tests.engine.models import make, saved, tokenizer
from tests.engine.trainers import metric
from tests.engine.trainers import trainer as make_trainer

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.usefixtures("one_process")]

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: `tox run -e gpu` needs one", allow_module_level=True)
pytest.importorskip("peft")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 1 << 30
SMALL = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05, "max_position_embeddings": 1024}


@pytest.fixture
def fast(request):
    """Loads a folder, and ends its engine after the test."""

    def load(folder, **settings):
        import trl_turbo

        model, loaded = trl_turbo.from_pretrained(
            str(folder), fast_inference=True, **{"kv_cache_memory_bytes": GIB, "max_num_seqs": 8, **settings}
        )
        request.addfinalizer(lambda: shut_down(model.fast_generate.llm))
        return model, loaded

    return load


class Peak:
    """The most memory that is in use on the device meanwhile, as the driver sees it, above what was before."""

    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.before = self.highest = self.used()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def used(self):
        free, total = torch.cuda.mem_get_info()
        return total - free

    def watch(self):
        while not self.over.wait(0.002):
            self.highest = max(self.highest, self.used())

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()

    @property
    def nbytes(self):
        return self.highest - self.before


def lora(**settings):
    from peft import LoraConfig

    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "target_modules": ALL, **settings})


def gap_of(model):
    """vLLM's log-probs of an answer against the model's own, with the weights and the adapter of this moment."""
    llm = model.fast_generate.llm
    llm.refresh()
    return llm.shared.compare(llm._sample)


def step(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))


def test_there_is_one_copy_from_the_first_byte_on(tmp_path, fast):
    """Weights of about 2.7 GiB, so that a second copy cannot hide in graphs, activations and adapter buffers."""
    with torch.device("cuda"):
        made = make(
            "llama",
            dtype=torch.bfloat16,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=14,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=2048,
            initializer_range=0.02,
        )
    made.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    del made
    with Peak() as peak:
        model, _ = fast(tmp_path, max_lora_rank=16)
    weights = sum(p.nbytes for p in model.parameters())
    print(f"weights {weights / GIB:.2f} GiB, peak {peak.nbytes / GIB:.2f} GiB with 1 GiB of KV cache")
    print(model.fast_generate.llm.memory_report())
    assert weights > 2.5 * GIB
    assert peak.nbytes < 1.9 * weights + GIB  # a second copy alone would make it 2 x weights + 1 GiB
    assert model.fast_generate.llm.memory_report().copied_bytes == 0

    expected = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for (name, ours), (other, theirs) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other
        assert ours.is_cuda
        assert torch.equal(ours.cpu(), theirs), name
    for (name, ours), (_, theirs) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert ours.is_cuda
        assert torch.equal(ours.cpu(), theirs), name
    with Peak() as control:
        expected.cuda()
    assert control.nbytes > 0.95 * weights  # what the driver would show of a second copy


@pytest.mark.parametrize("way", ["served", "merged"])
def test_graphs_follow_training_and_adapters_that_come_and_go(way, tmp_path, fast, monkeypatch):
    from peft import get_peft_model

    monkeypatch.setenv("TRL_TURBO_ROLLOUT_ADAPTER", way)
    saved(tmp_path, "qwen2_tied", dtype=torch.bfloat16, **SMALL)
    model, _ = fast(tmp_path, max_lora_rank=16)
    llm = model.fast_generate.llm
    assert graphs(llm) > 0
    pointers = [p.data_ptr() for p in model.parameters()]
    before = gap_of(model)
    assert before.reason is None, before
    model.requires_grad_()
    step(model)
    assert gap_of(model).reason is None
    torch.manual_seed(1)
    wrapped = get_peft_model(model, lora())
    for _ in range(3):
        step(wrapped)
        gap = gap_of(wrapped)
        assert gap.reason is None, gap
    assert llm.shared.adapter is not None
    if way == "served":
        step(wrapped)
        assert llm.shared.compare(llm._sample).mean > 3 * before.mean  # control: not pushed
    (output,) = wrapped.fast_generate([5, 6, 7, 8], use_tqdm=False)
    assert output.outputs[0].token_ids
    merged = wrapped.merge_and_unload()
    gap = gap_of(merged)
    assert gap.reason is None, gap
    assert llm.shared.adapter is None
    assert [p.data_ptr() for p in merged.parameters()] == pointers


def test_the_cache_stays_released_and_the_weights_stay(tmp_path, fast):
    saved(tmp_path, "qwen2_tied", dtype=torch.bfloat16, **SMALL)
    model, _ = fast(tmp_path, max_lora_rank=0)
    llm = model.fast_generate.llm
    values = [p.detach().clone() for p in model.parameters()]
    torch.cuda.synchronize()
    awake = torch.cuda.mem_get_info()[0]
    llm.release()
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] - awake > 0.9 * GIB
    assert model.fast_generate("12+7=", use_tqdm=False)[0].outputs[0].token_ids
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] - awake > 0.9 * GIB  # released before the call, and so after it
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    assert gap_of(model).reason is None


@pytest.mark.trl
@pytest.mark.parametrize("adapter", [False, True])
def test_grpo_samples_from_the_models_engine(adapter, tmp_path, fast, monkeypatch):
    import vllm

    import trl_turbo

    saved(tmp_path / "model", "qwen2_tied", dtype=torch.bfloat16, **SMALL)
    loaded = fast(tmp_path / "model", max_lora_rank=16, max_seq_length=512)
    llm = loaded[0].fast_generate.llm

    def refuse(self, *args, **kwargs):
        raise AssertionError("a second engine was started")

    trl_turbo.patch(logprob=False, rollout=True, verbose=False)
    monkeypatch.setattr(vllm.LLM, "__init__", refuse)
    try:
        trained = make_trainer(
            "GRPO",
            tmp_path,
            loaded=loaded,
            peft_config=lora() if adapter else None,
            max_steps=3,
            learning_rate=1e-3 if adapter else 1e-4,
            use_cpu=False,
            bf16=True,
        )
        assert trained.vllm_generation.llm.shared is llm.shared
        trained.train()
        gaps = metric(trained, "sampling/sampling_logp_difference/mean")
        print(f"adapter {adapter}: sampling log-prob differences {gaps}")
        assert len(gaps) == 3
        assert max(gaps) < 0.05, gaps  # rounding in bf16: 0.011 was seen for a model of 1.5 B, and 0.9 for a wrong one
        assert gap_of(trained.model).reason is None
    finally:
        trl_turbo.unpatch()
