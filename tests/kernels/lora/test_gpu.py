"""On a GPU: rounding and dropout against PEFT's layers, the buffer over streams, and what stays allocated."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from torch import nn

from tests.kernels.lora.linears import parameters, peft_layer, plainly, projection
from tests.kernels.lora.test_casts import BF16, half, passes
from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.kernels.lora import Dense, Projection, casts, lora_linear, lora_mlp, lora_qkv, scratch, together
from trl_turbo.patches.lora.plan import projection as planned

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: `tox run -e gpu` needs one", allow_module_level=True)

SLACK = 0.1
MIB = 1 << 20
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def on_cuda(p):
    """The same projection on the device, with leaves of its own."""
    bias = None if p.base.bias is None else p.base.bias.cuda()
    made = tuple(
        a._replace(lora_A=a.lora_A.detach().cuda().requires_grad_(), lora_B=a.lora_B.detach().cuda().requires_grad_())
        for a in p.adapters
    )
    return Projection(Dense(p.base.weight.cuda(), bias, p.base.dtype), made, p.compute, p.result)


def results(function, x, grad, weights):
    x = x.clone().requires_grad_()
    torch.manual_seed(4)
    for weight in weights:
        weight.grad = None
    y = function(x)
    y.backward(grad)  # checkpointing with reentrance refuses autograd.grad
    return [y.detach(), x.grad, *(weight.grad for weight in weights)]


def halves(layer):
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "fp32-adapters"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_no_worse_than_of_pefts_layer(dtype, adapter, autocast):
    made = projection(520, 1000, (16,), dtype, adapter=adapter)
    layer = peft_layer(made).cuda()
    x, grad = torch.randn(700, 1000).to("cuda", dtype), torch.randn(700, 520).to("cuda", dtype)
    lower = torch.bfloat16 if dtype == torch.float32 else dtype
    with torch.autocast("cuda", lower, enabled=autocast):
        stock = results(layer, x, grad.to(lower if autocast else dtype), halves(layer))
        found = results(
            lambda x: lora_linear(x, planned(layer, x.dtype, x.device)),
            x,
            grad.to(lower if autocast else dtype),
            halves(layer),
        )
    true = on_cuda(projection(520, 1000, (16,)))
    for tensor, other in zip(parameters(true), halves(layer), strict=True):
        tensor.data = other.detach().double()
    base = layer.base_layer
    true = Projection(
        Dense(base.weight.double(), base.bias.double(), torch.float64), true.adapters, *(torch.float64,) * 2
    )
    truth = results(lambda x: plainly(x, true), x.double(), grad.double(), parameters(true))
    for mine, theirs, want in zip(found, stock, truth, strict=True):
        assert mine.dtype == theirs.dtype
        assert excess_error(mine, theirs, want, SLACK + 3 / want.numel() ** 0.5) <= 1


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dropout_drops_what_pefts_layer_drops(dtype, autocast):
    """With weights of one the gradient of x shows the mask: equal element by element, whatever else is rounded."""
    made = projection(8, 1024, (8,), dtype, adapter=torch.float32, dropout=0.25, bias=False)
    layer = peft_layer(made).cuda()
    with torch.no_grad():
        for weight in halves(layer):
            weight.fill_(1)
        layer.base_layer.weight.zero_()
    x, grad = torch.ones(64, 1024, device="cuda", dtype=dtype), None
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        grad = torch.ones_like(layer(x))
        stock = results(layer, x, grad, halves(layer))
        found = results(lambda x: lora_linear(x, planned(layer, x.dtype, x.device)), x, grad, halves(layer))
    assert torch.equal(found[1] == 0, stock[1] == 0)
    share = (found[1] != 0).double().mean().item()
    assert abs(share - 0.75) < 4 * (0.25 * 0.75 / x.numel()) ** 0.5
    torch.testing.assert_close(found[0].float(), stock[0].float(), rtol=0.02, atol=0)


def test_a_recomputed_forward_draws_the_same():
    from torch.utils.checkpoint import checkpoint

    made = [on_cuda(projection(256, 256, (8,), torch.bfloat16, dropout=0.3, seed=i)) for i in range(3)]
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    run = lambda x: lora_mlp(x, *made, "silu")  # noqa: E731
    grad = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    plain = results(run, x, grad, parameters(*made))
    for reentrant in (True, False):
        again = results(partial(checkpoint, run, use_reentrant=reentrant), x, grad, parameters(*made))
        for one, other in zip(again, plain, strict=True):
            assert torch.equal(one, other)


def test_adapters_cast_in_one_launch_have_the_bits_of_those_cast_one_by_one():
    """Numbers that round up, down and to even, of all sizes; and all that passes make of them."""
    family = [on_cuda(half(256, 256)), on_cuda(half(256, 256, seed=1))]
    for i, weight in enumerate(parameters(*family)):
        bits = torch.arange(weight.numel(), device="cuda", dtype=torch.int32) * 524_309 + i
        weight.data.copy_(bits.view(torch.float32).nan_to_num(0.0, 0.0, 0.0).view(weight.shape))
    (cast,) = casts.casts_of(together(*family))
    with torch.no_grad():
        found, wanted = cast.a, torch.cat([p.adapters[0].lora_A for p in family]).to(BF16)
        assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
        for b, p in zip(cast.b, family, strict=True):
            assert torch.equal(b.view(torch.int16), p.adapters[0].lora_B.to(BF16).view(torch.int16))
    packed = passes(moved=on_cuda)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(casts, "_FEWEST", 1 << 10)
        assert all(map(torch.equal, packed, passes(moved=on_cuda)))


@pytest.mark.parametrize("kind", ["mlp", "qkv"])
def test_what_stays_allocated(kind):
    """x is its caller's: gate, up and the narrow side, and nothing else of x's or of a weight's size."""
    rows, hidden, inner, rank = 4096, 512, 2048, 16
    outputs = {"mlp": [(inner, hidden), (inner, hidden), (hidden, inner)], "qkv": [(hidden, hidden)] * 3}[kind]
    made = [on_cuda(projection(o, i, (rank,), torch.bfloat16, dropout=0.1)) for o, i in outputs]
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run():
        return (lora_mlp(x, *made, "silu"),) if kind == "mlp" else lora_qkv(x, *made)

    run()  # Triton and cuBLAS take what they keep
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    ys = run()
    kept = torch.cuda.memory_allocated() - before - sum(y.nbytes for y in ys)
    wanted = 3 * rows * rank * 2 + (2 * rows * inner * 2 if kind == "mlp" else 0)
    assert wanted <= kept <= wanted + MIB


def four_bit(outputs, inputs, seed=0):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(seed)
    linear = bnb.nn.Linear4bit(inputs, outputs, False, torch.bfloat16, True, "nf4").to(torch.bfloat16)
    linear.load_state_dict(nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16).state_dict())
    return linear.to("cuda").requires_grad_(False)


def adapted(linears):
    from peft import LoraConfig, get_peft_model

    model = nn.Module()
    for name, made in linears.items():
        model.add_module(name, made)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = True, False
    config = LoraConfig(r=16, target_modules=list(linears), init_lora_weights=False)
    peft = get_peft_model(model, config).base_model.model
    return [getattr(peft, name).to(torch.bfloat16).train() for name in linears]


@pytest.mark.parametrize("rows", [1, 700, 4096])
def test_nf4(rows):
    (layer,) = adapted({"linear": four_bit(768, 512)})
    x, grad = (torch.randn(rows, n, device="cuda", dtype=torch.bfloat16) for n in (512, 768))
    stock = results(layer, x, grad, halves(layer))
    found = results(lambda x: lora_linear(x, planned(layer, x.dtype, x.device)), x, grad, halves(layer))
    import bitsandbytes as bnb

    base = layer.get_base_layer()
    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()
    leaves = [w.detach().double().requires_grad_() for w in halves(layer)]
    run = lambda x: x @ weight.t() + x @ leaves[0].t() @ leaves[1].t() * layer.scaling["default"]  # noqa: E731
    truth = results(run, x.double(), grad.double(), leaves)
    for mine, theirs, want in zip(found, stock, truth, strict=True):
        assert excess_error(mine, theirs, want, SLACK + 3 / want.numel() ** 0.5) <= 1


def test_streams_have_buffers_of_their_own():
    """Two streams at once, many times: neither multiplies by what the other is dequantising."""
    layers = adapted({"a": four_bit(2048, 2048, 1), "b": four_bit(2048, 2048, 2)})
    x = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = [layer(x).detach() for layer in layers]
    scratch.release()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = []
    for _ in range(30):
        for layer, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(lora_linear(x, planned(layer, x.dtype, x.device)).detach())
    torch.cuda.synchronize()
    assert scratch.held_bytes() == 2 * 2 * 2048 * 2048
    for index, y in enumerate(found):
        assert (y - wanted[index % 2]).float().norm() <= 0.02 * wanted[index % 2].float().norm()
