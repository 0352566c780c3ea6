"""The LoRA functions: gradients in float64, rounding against PEFT's layers, what they keep and refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.kernels.lora.linears import F64, exact, parameters, peft_layer, plainly, projection
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.kernels.lora import lora_linear, lora_mlp, lora_qkv, reference, single
from trl_turbo.kernels.lora.spec import together

SLACK = 0.1  # of root mean square error, beyond what PEFT's layers lose in the same dtypes
RANKS = [(2,), (), (1, 3)]
LOW = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


def seeded(function, *args):
    torch.manual_seed(4)
    return function(*args)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_gradients_of_linears_that_share_an_input(ranks, dropout):
    x = torch.randn(2, 3, 5, dtype=F64, requires_grad=True)
    made = [projection(4, 5, ranks, dropout=dropout), projection(3, 5, (1,), bias=False, seed=1)]

    def run(x, *_):
        return seeded(lambda: lora_qkv(x, *made))

    assert torch.autograd.gradcheck(run, (x, *parameters(*made)))
    for ours, truth in zip(run(x), seeded(lambda: [plainly(x, p) for p in made]), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gradients_of_the_gated_mlp(activation, ranks, dropout):
    x = torch.randn(2, 2, 4, dtype=F64, requires_grad=True)
    gate, up = projection(5, 4, ranks, dropout=dropout), projection(5, 4, (2,), seed=1)
    down = projection(4, 5, ranks, dropout=dropout, bias=False, seed=2)

    def run(x, *_):
        return seeded(lambda: lora_mlp(x, gate, up, down, activation))

    def plain():
        return plainly(reference.ACTIVATIONS[activation](plainly(x, gate)) * plainly(x, up), down)

    assert torch.autograd.gradcheck(run, (x, *parameters(gate, up, down)))
    torch.testing.assert_close(run(x), seeded(plain))


@pytest.mark.parametrize("frozen", ["x", "lora_A", "lora_B", "adapters"])
def test_only_what_is_wanted_has_a_gradient(frozen):
    made = [projection(4, 5, (2,)), projection(3, 5, (3,), seed=1)]
    x = torch.randn(6, 5, dtype=F64, requires_grad=frozen != "x")
    for p in made:
        for adapter in p.adapters:
            adapter.lora_A.requires_grad_(frozen not in ("lora_A", "adapters"))
            adapter.lora_B.requires_grad_(frozen not in ("lora_B", "adapters"))
    wanted = [t for t in (x, *parameters(*made)) if t.requires_grad]
    ours = torch.autograd.grad(sum(y.sin().sum() for y in lora_qkv(x, *made)), wanted)
    truth = torch.autograd.grad(sum(plainly(x, p).sin().sum() for p in made), wanted)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("frozen", [None, "x", "lora_A", "lora_B", "adapters"])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_one_linear_gives_what_it_gives_among_several(frozen, dtype):
    """To the bit: its short path makes the same products in the same order."""
    made = projection(4, 5, (2,), dtype)
    adapter = made.adapters[0]
    x = torch.randn(3, 2, 5, dtype=dtype).transpose(0, 1).requires_grad_(frozen != "x")
    adapter.lora_A.requires_grad_(frozen not in ("lora_A", "adapters"))
    adapter.lora_B.requires_grad_(frozen not in ("lora_B", "adapters"))
    wanted = [t for t in (x, *parameters(made)) if t.requires_grad]
    grad = torch.randn(3, 2, 4, dtype=dtype).transpose(0, 1)
    outcomes = []
    for y in (lora_linear(x, made), lora_qkv(x, made)[0]):
        outcomes.append((y.detach(), *torch.autograd.grad(y, wanted, grad)))
    for one, other in zip(*outcomes, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one, other)


@pytest.mark.parametrize("frozen", [None, "x", "lora_A", "lora_B"])
@pytest.mark.parametrize(("dtype", "adapter"), [(F64, F64), *LOW[:4]], ids=str)
def test_what_torch_differentiates_is_the_same(frozen, dtype, adapter):
    """A short product on a GPU; and where a dtype rounds, no worse than PEFT's layer."""
    made = projection(48, 80, (4,), dtype, adapter=adapter)
    layer, mixed = peft_layer(made), dtype != adapter
    linears = together(in_autocast(made, dtype) if mixed else made)
    names = [name for name in ("x", "lora_A", "lora_B") if name != frozen]
    x = torch.randn(2, 30, 80, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_(frozen != "x")
    grad = torch.randn(2, 30, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    ours = {"x": x, "lora_A": made.adapters[0].lora_A, "lora_B": made.adapters[0].lora_B}
    theirs = {"x": x, "lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    for tensors in (ours, theirs):
        for name, tensor in tensors.items():
            tensor.requires_grad_(name != frozen)
    y = single.in_torch(x, linears)
    found = [y.detach(), *torch.autograd.grad(y, [ours[name] for name in names], grad)]
    with torch.autocast("cpu", dtype if mixed else None, enabled=mixed):
        y = layer(x)
    stock = [y.detach(), *torch.autograd.grad(y, [theirs[name] for name in names], grad)]
    everything = dict(zip(("y", "x", "lora_A", "lora_B"), exact_results(made, x.detach(), grad), strict=True))
    for name, mine, other in zip(("y", *names), found, stock, strict=True):
        true = everything[name]
        assert mine.dtype == other.dtype
        if dtype == F64:
            torch.testing.assert_close(mine, true)
        else:
            assert excess_error(mine, other, true, SLACK + 3 / true.numel() ** 0.5) <= 1, name


def test_a_weight_changed_before_torchs_backward_raises():
    made = projection(4, 5, (2,))
    y = single.in_torch(torch.randn(3, 5, dtype=F64, requires_grad=True), together(made)).sum()
    made.base.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_an_output_without_a_gradient():
    made = [projection(4, 5, (2,)), projection(3, 5, (3,), seed=1)]
    x = torch.randn(6, 5, dtype=F64, requires_grad=True)
    lora_qkv(x, *made)[1].sum().backward()
    truth = torch.autograd.grad(plainly(x, made[1]).sum(), (x, *parameters(made[1])))
    assert [t.grad for t in parameters(made[0])] == [None, None]
    for tensor, true in zip((x, *parameters(made[1])), truth, strict=True):
        torch.testing.assert_close(tensor.grad, true)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter"), LOW, ids=str)
def test_rounding_is_no_worse_than_of_pefts_layer(dtype, adapter, dropout, autocast):
    """Result, gradient of x and of both halves, against float64, with the same elements dropped."""
    made = projection(96, 160, (8,), dtype, adapter=adapter, dropout=dropout)
    ours = made if autocast is None else in_autocast(made, autocast)
    layer = peft_layer(made)
    x = torch.randn(2, 60, 160, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad = torch.randn(2, 60, 96, generator=torch.Generator().manual_seed(2)).to(autocast or dtype)
    found = results(lambda x: lora_linear(x, ours), x, grad, parameters(made))
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        stock = results(layer, x, grad, weights)
    # Both drop the same elements from one seed, so the truth may drop them too; its draw must be of the same dtype
    truth = exact_results(made, x, grad)
    assert found[0].dtype == stock[0].dtype
    for name, mine, theirs, true in zip(("y", "x", "A", "B"), found, stock, truth, strict=True):
        assert mine.dtype == theirs.dtype
        assert excess_error(mine, theirs, true, SLACK + 3 / true.numel() ** 0.5) <= 1, name


def in_autocast(made, dtype):
    from dataclasses import replace

    return replace(made, base=replace(made.base, dtype=dtype), compute=dtype, result=dtype)


def results(function, x, grad, weights):
    x = x.clone().requires_grad_()
    y = seeded(function, x)
    return [y.detach(), *torch.autograd.grad(y, (x, *weights), grad)]


def exact_results(made, x, grad):
    true, x = exact(made), x.double().requires_grad_()
    (adapter,) = true.adapters
    share = adapter.dropout
    ones = torch.ones(x.shape[0] * x.shape[1], x.shape[2], dtype=made.adapters[0].lora_A.dtype)
    kept = seeded(lambda: nn.functional.dropout(ones, share)).view(x.shape) if share else 1.0
    kept = (kept > 0).double() / (1 - share) if share else kept
    y = nn.functional.linear(x, true.base.weight, true.base.bias)
    y = y + (x * kept) @ adapter.lora_A.t() @ adapter.lora_B.t() * adapter.scaling
    return [y.detach(), *torch.autograd.grad(y, (x, adapter.lora_A, adapter.lora_B), grad.double())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_mlp_rounds_no_worse_than_pefts_layers(dtype):
    made = [projection(96, 64, (8,), dtype, seed=0), projection(96, 64, (8,), dtype, seed=1)]
    made.append(projection(64, 96, (8,), dtype, seed=2))
    layers = [peft_layer(p) for p in made]
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad = torch.randn(100, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = results(lambda x: lora_mlp(x, *made, "silu"), x, grad, parameters(*made))
    weights = [t for layer in layers for t in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)]
    stock = results(lambda x: layers[2](nn.functional.silu(layers[0](x)) * layers[1](x)), x, grad, weights)
    true = [exact(p) for p in made]
    run = lambda x: plainly(nn.functional.silu(plainly(x, true[0])) * plainly(x, true[1]), true[2])  # noqa: E731
    truth = results(run, x.double(), grad.double(), parameters(*true))
    for mine, theirs, want in zip(found, stock, truth, strict=True):
        assert excess_error(mine, theirs, want, SLACK + 3 / want.numel() ** 0.5) <= 1


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (2, 0, 5), (1, 1, 5)], ids=str)
def test_few_rows_or_none(shape):
    made = [projection(4, 5, (2,)), projection(3, 5, (1,), seed=1)]
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    for ours, p in zip(lora_qkv(x, *made), made, strict=True):
        torch.testing.assert_close(ours, plainly(x, p))
    torch.autograd.grad(sum(y.sum() for y in lora_qkv(x, *made)), (x, *parameters(*made)))


def test_strided_input_and_gradient_are_read_and_not_written_to():
    made = projection(4, 5, (2,))
    x = torch.randn(7, 6, 5, dtype=F64).transpose(0, 1)
    before, copied = x.clone(), x.clone().contiguous().requires_grad_()
    x.requires_grad_()
    grad = torch.randn(4, 6, 7, dtype=F64).permute(1, 2, 0)
    kept = grad.clone()
    ours = torch.autograd.grad(lora_linear(x, made), (x, *parameters(made)), grad)
    truth = torch.autograd.grad(plainly(copied, made), (copied, *parameters(made)), grad)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true)
    assert torch.equal(x, before)
    assert torch.equal(grad, kept)


def test_without_gradients_the_result_is_the_same():
    made = projection(4, 5, (2,))
    x = torch.randn(3, 5, dtype=F64)
    with torch.no_grad():
        quick = lora_linear(x, made)
    assert not quick.requires_grad
    assert torch.equal(quick, lora_linear(x, made))


def test_what_is_kept_for_backward_is_x_once_and_the_narrow_side():
    made = [projection(64, 48, (4,), torch.float32, dropout=0.5, seed=i) for i in range(3)]
    x = torch.randn(20, 48, requires_grad=True)
    assert kept(lambda: lora_qkv(x, *made)) == {(20, 48), (20, 12)}
    assert kept(lambda: lora_linear(x, projection(64, 48, (4,), torch.float32))) == {(20, 48), (20, 4)}
    gate, up, down = made[0], made[1], projection(48, 64, (4,), torch.float32, dropout=0.5)
    assert kept(lambda: lora_mlp(x, gate, up, down, "silu")) == {(20, 48), (20, 64), (20, 8), (20, 4)}
    with_plain_torch = kept(lambda: [plainly(x, p) for p in made])
    assert len(with_plain_torch) > 2  # control: autograd keeps more than that


def kept(run):
    shapes = set()

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return shapes


def test_backward_drops_what_forward_dropped():
    """With ones for weights the gradient of x shows the mask."""
    made = projection(1, 4000, (1,), dropout=0.25, bias=False)
    made.base.weight.zero_()
    with torch.no_grad():
        for tensor in parameters(made):
            tensor.fill_(1)
    x = torch.ones(2, 4000, dtype=F64, requires_grad=True)
    y = seeded(lora_linear, x, made)
    before = torch.get_rng_state()
    torch.manual_seed(99)  # backward neither follows nor moves what is drawn meanwhile
    meanwhile = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), meanwhile)
    assert not torch.equal(before, meanwhile)
    mask = (x.grad / (1.7 / 0.75)).round()
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(y[:, 0], mask.sum(1) * 1.7 / 0.75)
    torch.testing.assert_close(made.adapters[0].lora_A.grad[0], mask.sum(0) * 1.7 / 0.75)
    assert abs(mask.mean().item() - 0.75) < 4 * (0.25 * 0.75 / 8000) ** 0.5
    assert not torch.equal(mask[0], mask[1])


def test_backward_twice_and_a_second_derivative_raise():
    made = projection(4, 5, (2,))
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    y = lora_linear(x, made).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
    (grad,) = torch.autograd.grad(lora_linear(x, made).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_a_weight_changed_before_backward_raises(which):
    made = projection(4, 5, (2,))
    y = lora_linear(torch.randn(3, 5, dtype=F64), made).sum()
    with torch.no_grad():
        (made.base.weight if which == "base" else made.adapters[0].lora_A).mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        y.backward()


def test_what_does_not_fit_is_said_in_one_sentence():
    x = torch.randn(3, 5, dtype=F64)
    with pytest.raises(ValueError, match=r"does not fit x .*; pass adapters of one r"):
        lora_linear(x, projection(4, 6, (2,)))
    with pytest.raises(ValueError, match=r"in one dtype.*; pass projections of one"):
        lora_qkv(x, projection(4, 5), projection(4, 5, (2,), torch.float32))
    with pytest.raises(ValueError, match="at least one"):
        lora_qkv(x)
