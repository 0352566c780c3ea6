"""Norms, rotary embeddings and gated MLPs of real models: what is adopted, how near the truth it is, what it keeps."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import trl_turbo
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.report import Report

from .block_models import MODELS, RUNS, make, ran, results, tokens
from .models import ALONE

DTYPES = [torch.float32, torch.bfloat16]
FEATURES = ("norms", "rope", "mlp")


def patch(*features: str) -> Report:
    on = {name: name in (features or FEATURES) for name in FEATURES}
    return trl_turbo.patch(strict=True, verbose=False, logprob=False, **{**ALONE, **on})


def prepared(model: Any, *features: str) -> Any:
    patch(*features)
    return Accelerator(cpu=True).prepare_model(model)


def notes() -> list[str]:
    return [note.text for note in trl_turbo.status().notes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_as_near_the_truth_as_stock(name: str, dtype: torch.dtype) -> None:
    """Logits and gradients of three models: pooled, an error of at most 1.1 times stock's; of no tensor twice that."""
    squares: dict[str, list[float]] = {}
    floor = 32 * torch.finfo(torch.float32).eps
    for seed in range(3):
        model, ids = make(name, dtype, seed), tokens(seed)
        truth, plain = results(make(name, torch.float64, seed), ids), results(model, ids)
        model = prepared(model)
        assert ran(model(input_ids=ids).logits) == RUNS[name]
        found, noted = results(model, ids), notes()
        trl_turbo.unpatch()
        assert len(noted) == (name == "cohere"), noted  # its norms subtract the mean
        scale = {"logits": truth["logits"].norm().item()}
        total = math.sqrt(sum(t.norm().item() ** 2 for key, t in truth.items() if key != "logits"))
        for key, true in truth.items():
            size = scale.get(key, total)
            sums = squares.setdefault(key, [0.0, 0.0])
            for i, run in enumerate((found, plain)):
                sums[i] += ((run[key].double() - true).norm().item() / size) ** 2
    assert all(math.sqrt(ours) <= 2 * math.sqrt(stock) + floor for ours, stock in squares.values()), squares
    for group in ({"logits"}, squares.keys() - {"logits"}):
        ours, stock = (math.sqrt(sum(squares[key][i] for key in group)) for i in (0, 1))
        assert ours <= 1.1 * stock + floor, (ours, stock)


def test_each_feature_by_itself() -> None:
    for feature, counts in zip(FEATURES, ((9, 0, 0), (0, 2, 0), (0, 0, 2)), strict=True):
        assert ran(prepared(make("qwen3"), feature)(input_ids=tokens()).logits) == counts
        trl_turbo.unpatch()


def test_on_unless_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    trl_turbo.patch(verbose=False)
    assert ran(Accelerator(cpu=True).prepare_model(make("qwen3"))(input_ids=tokens()).logits) == RUNS["qwen3"]
    trl_turbo.unpatch()
    for feature in FEATURES:
        monkeypatch.setenv(f"TRL_TURBO_{feature.upper()}", "0")
    rows = [row for row in trl_turbo.patch(verbose=False) if row.feature in FEATURES]
    assert len(rows) == len(FEATURES)
    assert all(row.status == "off" for row in rows)
    assert ran(Accelerator(cpu=True).prepare_model(make("qwen3"))(input_ids=tokens()).logits) == (0, 0, 0)


def test_unpatch_gives_everything_back() -> None:
    models = [make(name) for name in MODELS]
    kinds = {type(part) for model in models for part in model.modules()}
    owners: list[Any] = [*{owner for kind in kinds for owner in kind.__mro__}]
    owners += {kind.__module__: sys.modules[kind.__module__] for kind in kinds}.values()
    before = [dict(vars(owner)) for owner in owners]
    patch()
    accelerator = Accelerator(cpu=True)
    for model in models:
        accelerator.prepare_model(model)
    changed = sum(dict(vars(owner)) != then for owner, then in zip(owners, before, strict=True))
    assert changed > 2 * len(MODELS), "fewer classes and files were changed than there are"
    for model in models:
        model(input_ids=tokens())
    trl_turbo.unpatch()
    for owner, then in zip(owners, before, strict=True):
        now = dict(vars(owner))
        assert not [k for k in now.keys() | then.keys() if now.get(k) is not then.get(k) and k != "__warningregistry__"]
    assert ran(models[0](input_ids=tokens()).logits) == (0, 0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_adopted_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """The kernels that run there agree with a model's own code, too; wide enough for more than one block."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    wide = {"hidden_size": 256, "intermediate_size": 320, "head_dim": 64}
    model, ids = make(name, dtype, **wide).cuda(), tokens(shape=(2, 300)).cuda()
    truth = results(make(name, torch.float64, **wide).cuda(), ids)["logits"]
    stock = results(model, ids)["logits"]
    patch()
    Accelerator().prepare_model(model)
    assert ran(model(input_ids=ids).logits) == RUNS[name], notes()
    assert len(notes()) == (name == "cohere"), notes()
    assert excess_error(results(model, ids)["logits"], stock, truth) <= 1


def kept_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """What a forward keeps for backward beside the parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=ids).logits
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(("name", "norms"), [("llama", 2), ("qwen3", 2), ("gemma3-text", 4), ("phi3", 2)])
def test_bytes_kept_in_a_layer(name: str, norms: int) -> None:
    """In bf16: what our ops say that they keep, what linears and attention need, and nothing else."""
    ids, dtype = tokens(shape=(2, 64)), torch.bfloat16

    def of_a_layer(ours: bool) -> float:
        kept = []
        for layers in (2, 4):
            model = make(name, dtype, num_hidden_layers=layers, attn_implementation="sdpa")
            kept.append(kept_bytes(prepared(model) if ours else model, ids))
            trl_turbo.unpatch()
        return (kept[1] - kept[0]) / 2 / ids.numel()

    config = make(name).config
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    queries, keys = heads * config.head_dim, key_heads * config.head_dim
    two, four = 2, 4  # bytes of bf16 and float32
    hidden, gate = config.hidden_size * two, config.intermediate_size * two
    bound = norms * (hidden + four) + 2 * hidden  # inputs of norms, 1 / rms; inputs of attention and MLP
    if name == "qwen3":
        bound += (queries + keys) * two + (heads + key_heads) * four  # norms of queries and keys
    bound += 2 * (queries + keys) * two + heads * four  # queries, keys, values, the answer, its logsumexp
    bound += 3 * gate  # gate, up, and their product, the input of the last linear
    stock, ours = of_a_layer(False), of_a_layer(True)
    if name != "gemma3-text":  # whose attention keeps more on transformers 4
        assert ours <= bound, (ours, bound, stock)
    # Stock keeps a norm's input in float32 besides, and act(gate)
    assert stock - ours >= norms * config.hidden_size * four + gate, (ours, stock)


class Ours(nn.Module):
    """Norms under a name that nobody has: what they compute decides."""

    def __init__(self, formula: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.eps, self.formula = nn.Parameter(torch.ones(48)), 1e-5, formula

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.formula(states, self.weight, self.eps)


def rms(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return (x.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt()


NORMS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "llama": lambda x, w, eps: w * (x.float() * rms(x, eps)).to(x.dtype),
    "gemma": lambda x, w, eps: (x.float() * rms(x, eps) * (1 + w.float())).to(x.dtype),
    "olmo2": lambda x, w, eps: (w * (x.float() * rms(x, eps))).to(x.dtype),
}
OTHER_NORMS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "mean subtracted": lambda x, w, eps: NORMS["llama"](x - x.mean(-1, keepdim=True), w, eps),
    "eps outside the root": lambda x, w, eps: (
        w * (x.float() / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype)
    ),
    "another eps": lambda x, w, eps: NORMS["llama"](x, w, 2 * eps),
    "another offset": lambda x, w, eps: NORMS["gemma"](x, w + 0.5, eps),
    "no gradient through the root": lambda x, w, eps: w * (x.float() * rms(x, eps).detach()).to(x.dtype),
    "unbiased": lambda x, w, eps: NORMS["llama"](x, w, eps) * (47 / 48) ** 0.5,
}


def planted(base: type[nn.Module], *args: Any) -> Any:
    """An instance of a new class in a model of its own: adoption is of classes."""
    return nn.Sequential(type("Planted", (base,), {"forward": base.forward})(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [*NORMS, *OTHER_NORMS])
def test_norms_are_adopted_by_what_they_compute(form: str, dtype: torch.dtype) -> None:
    model = planted(Ours, {**NORMS, **OTHER_NORMS}[form]).to(dtype)
    forward = type(model[0]).forward
    prepared(model)
    x = torch.randn(4, 48, dtype=dtype)
    assert ran(model(x)) == (form in NORMS, 0, 0)
    if form in OTHER_NORMS:
        assert [n for n in notes() if "Planted computes something else" in n], notes()
        assert type(model[0]).forward is forward


def by_dtype(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    return (OTHER_NORMS["mean subtracted"] if x.dtype == torch.bfloat16 else NORMS["llama"])(x, w, eps)


def test_weight_of_another_dtype_is_checked_as_it_comes() -> None:
    """Prepared in float32, where both forms are one; called in others, each is what the class then computes."""
    model = prepared(planted(Ours, by_dtype))
    assert ran(model(torch.randn(4, 48))) == (1, 0, 0)
    assert ran(model(torch.randn(4, 48).half())) == (1, 0, 0)
    assert not notes()
    low = model.bfloat16()(torch.randn(4, 48).bfloat16())
    assert ran(low) == (0, 0, 0)
    assert [n for n in notes() if "Planted in bfloat16 on cpu is in bfloat16 far from its answer in float64" in n], (
        notes()
    )


class Gated(nn.Module):
    def __init__(self, act: Callable[..., torch.Tensor], formula: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn, self.formula = act, formula

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.formula(self, x)


def swiglu(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


MLPS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "silu": (nn.functional.silu, swiglu),
    "gelu": (nn.GELU(), swiglu),
    "gelu_tanh": (nn.GELU(approximate="tanh"), swiglu),
    "relu": (nn.ReLU(), swiglu),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), swiglu),
    "gate and up swapped": (
        nn.functional.silu,
        lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x)),
    ),
    "clamped": (
        nn.functional.silu,
        lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=2) * self.up_proj(x)),
    ),
    "with the input added": (nn.functional.silu, lambda self, x: x + swiglu(self, x)),
    "scaled input": (nn.functional.silu, lambda self, x: swiglu(self, 2 * x)),
    "dropout": (
        nn.functional.silu,
        lambda self, x: self.down_proj(
            nn.functional.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x), 0.1, self.training)
        ),
    ),
}


@pytest.mark.parametrize("form", MLPS)
def test_mlps_are_adopted_by_what_they_compute(form: str) -> None:
    model = planted(Gated, *MLPS[form])
    x = torch.randn(4, 8)
    stock = model(x) if form != "dropout" else None
    prepared(model)
    good = form in ("silu", "gelu", "gelu_tanh")
    out = model(x)
    assert ran(out) == (0, 0, good)
    assert stock is None or torch.allclose(out, stock)
    assert good or [n for n in notes() if "Planted" in n and "stays as it is" in n], notes()


ROPES = """
def rotate(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return tuple({formula} for x in (q, k))
class Attention(torch.nn.Module):
    head_dim = 8
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
    def forward(self, q, k, cos, sin, **kwargs):
        return sum(x.sum() for x in apply_rotary_pos_emb(q, k, cos, sin, **kwargs))
"""


@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
@pytest.mark.parametrize(
    "formula", ["x * cos + rotate(x) * sin", "x * cos - rotate(x) * sin", "x * cos + rotate(x * sin)"]
)
def test_rope_is_adopted_by_what_it_computes(formula: str, module: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as the module that `use_kernel_forward_from_hub` makes of it, where the package `kernels` is installed."""
    file = type(sys)("planted_rope")
    file.torch = torch
    exec(ROPES.replace("{formula}", formula), vars(file))
    monkeypatch.setitem(sys.modules, "planted_rope", file)
    if module:
        function = file.apply_rotary_pos_emb
        kind = type(
            "Func", (nn.Module,), {"forward": lambda self, q, k, cos, sin, **kw: function(q, k, cos, sin, **kw)}
        )
        file.apply_rotary_pos_emb = kind()
    stock = file.apply_rotary_pos_emb
    model = prepared(nn.Sequential(file.Attention()))
    q, k = torch.randn(2, 4, 5, 8, requires_grad=True), torch.randn(2, 2, 5, 8)
    cos, sin = torch.rand(2, 1, 5, 8).unbind(0)
    good = "+ rotate(x) " in formula
    assert ran(model[0](q, k, cos, sin)) == (0, good, 0)
    assert good == (not notes()), notes()
    # Heads behind positions are laid out otherwise than ours takes them
    assert ran(model[0](q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)) == (0, 0, 0)
    prepared(model)
    if module:
        vars(stock)["forward"] = kind.forward.__get__(stock)  # as `kernelize` gives it a kernel
        assert ran(model[0](q, k, cos, sin)) == (0, 0, 0)
    trl_turbo.unpatch()
    assert file.apply_rotary_pos_emb is stock
    assert ran(model[0](q, k, cos, sin)) == (0, 0, 0)
