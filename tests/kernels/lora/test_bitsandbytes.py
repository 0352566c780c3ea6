"""LoRA over bitsandbytes' linears, against PEFT's own layers and against float64 sums of the dequantised weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trl_turbo.kernels.linear_logprob.reference import excess_error
from trl_turbo.kernels.lora import lora_linear, lora_mlp, lora_qkv, scratch
from trl_turbo.patches.lora.plan import projection

bnb = pytest.importorskip("bitsandbytes")

SLACK = 0.1
IN, OUT, RANK = 128, 192, 8


def four_bit(outputs, inputs, dtype, *, nested=True, kind="nf4", seed=0):
    torch.manual_seed(seed)
    linear = bnb.nn.Linear4bit(inputs, outputs, True, dtype, nested, kind)
    linear.load_state_dict(nn.Linear(inputs, outputs, dtype=dtype).state_dict())
    return linear.to("cpu").requires_grad_(False)


def eight_bit(outputs, inputs, dtype, *, threshold=6.0, seed=0):
    torch.manual_seed(seed)
    linear = bnb.nn.Linear8bitLt(inputs, outputs, True, has_fp16_weights=False, threshold=threshold)
    linear.load_state_dict(nn.Linear(inputs, outputs, dtype=dtype).state_dict())
    return linear.to("cpu").requires_grad_(False)


def adapted(linears, adapter_dtype, dropout=0.0):
    """PEFT's layers over the linears, in a module of their own."""
    from peft import LoraConfig, get_peft_model

    model = nn.Module()
    for name, linear in linears.items():
        model.add_module(name, linear)
    eight = any(isinstance(linear, bnb.nn.Linear8bitLt) for linear in linears.values())
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = eight, not eight
    config = LoraConfig(r=RANK, target_modules=list(linears), init_lora_weights=False, lora_dropout=dropout)
    peft = get_peft_model(model, config)
    found = {name: getattr(peft.base_model.model, name) for name in linears}
    for layer in found.values():
        layer.lora_A.to(adapter_dtype)
        layer.lora_B.to(adapter_dtype)
    return {name: layer.train() for name, layer in found.items()}


def weights(layers):
    return [half["default"].weight for layer in layers for half in (layer.lora_A, layer.lora_B)]


def run(function, x, grad, leaves):
    x = x.clone().requires_grad_()
    torch.manual_seed(6)
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *leaves), grad)]


def in_float64(layer):
    """The layer with its base dequantised, as a function of x in float64, and its leaves."""
    base = layer.get_base_layer()
    if isinstance(base, bnb.nn.Linear4bit):
        weight = bnb.functional.dequantize_4bit(base.weight, base.weight.quant_state).double()
    else:
        state = base.state
        weight = state.CB.double() * state.SCB.double().unsqueeze(1) / 127
    leaves = [w.detach().double().requires_grad_() for w in weights([layer])]

    def function(x):
        y = nn.functional.linear(x, weight, base.bias.double())
        return y + x @ leaves[0].t() @ leaves[1].t() * layer.scaling["default"]

    return function, leaves


def numbers(dtype, *shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("make", [four_bit, eight_bit], ids=["4bit", "8bit"])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "fp32-adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_no_worse_than_of_pefts_layer(make, dtype, adapter_dtype):
    layer = adapted({"linear": make(OUT, IN, dtype)}, adapter_dtype or dtype)["linear"]
    x, grad = numbers(dtype, 2, 40, IN), numbers(dtype, 2, 40, OUT, seed=2)
    stock = run(layer, x, grad, weights([layer]))  # also chooses the compute dtype
    found = run(lambda x: lora_linear(x, projection(layer, dtype, x.device)), x, grad, weights([layer]))
    function, leaves = in_float64(layer)
    truth = run(function, x.double(), grad.double(), leaves)
    for mine, theirs, true in zip(found, stock, truth, strict=True):
        assert mine.dtype == theirs.dtype
        assert excess_error(mine, theirs, true, SLACK + 3 / true.numel() ** 0.5) <= 1


@pytest.mark.parametrize("make", [four_bit, eight_bit], ids=["4bit", "8bit"])
def test_dropout_drops_what_pefts_layer_drops(make):
    layer = adapted({"linear": make(OUT, IN, torch.float32)}, torch.float32, dropout=0.4)["linear"]
    x, grad = numbers(torch.float32, 30, IN), numbers(torch.float32, 30, OUT, seed=2)
    stock = run(layer, x, grad, weights([layer]))
    found = run(lambda x: lora_linear(x, projection(layer, x.dtype, x.device)), x, grad, weights([layer]))
    for mine, theirs in zip(found, stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
def test_one_buffer_serves_linears_of_all_sizes(kind, nested):
    shapes = {"q_proj": (192, 128), "k_proj": (64, 128), "v_proj": (64, 128)}
    made = {n: four_bit(o, i, torch.float32, nested=nested, kind=kind) for n, (o, i) in shapes.items()}
    layers = adapted(made, torch.float32)
    x = numbers(torch.float32, 50, 128)
    stock = [layer(x.requires_grad_()) for layer in layers.values()]
    scratch.release()
    ours = lora_qkv(x, *(projection(layer, x.dtype, x.device) for layer in layers.values()))
    assert scratch.held_bytes() == 4 * 192 * 128  # the largest, once
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs)
    leaves = (x, *weights(layers.values()))
    found, wanted = (torch.autograd.grad(sum(y.sin().sum() for y in ys), leaves) for ys in (ours, stock))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert scratch.held_bytes() == 4 * 192 * 128


def test_gated_mlp_over_four_bits_keeps_no_dequantised_weight():
    shapes = {"gate_proj": (192, 128), "up_proj": (192, 128), "down_proj": (128, 192)}
    layers = adapted({n: four_bit(o, i, torch.float32, seed=o) for n, (o, i) in shapes.items()}, torch.float32)
    gate, up, down = layers.values()
    x, grad = numbers(torch.float32, 30, 128), numbers(torch.float32, 30, 128, seed=2)
    stock = run(lambda x: down(nn.functional.silu(gate(x)) * up(x)), x, grad, weights(layers.values()))
    shapes_kept = set()

    def pack(tensor):
        shapes_kept.add(tuple(tensor.shape))
        return tensor

    def ours(x):
        made = [projection(layer, x.dtype, x.device) for layer in layers.values()]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return lora_mlp(x, *made, "silu")

    for mine, theirs in zip(run(ours, x, grad, weights(layers.values())), stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert shapes_kept == {(30, 128), (30, 192), (30, 2 * RANK), (30, RANK)}


def test_threads_do_not_multiply_by_each_others_weight():
    """The buffer is filled and multiplied by under one lock."""
    from concurrent.futures import ThreadPoolExecutor

    layers = [adapted({"l": four_bit(256, 256, torch.float32, seed=s)}, torch.float32)["l"] for s in range(4)]
    x = numbers(torch.float32, 64, 256).requires_grad_()
    wanted = [layer(x) for layer in layers]

    def work(index):
        layer = layers[index % 4]
        y = lora_linear(x, projection(layer, x.dtype, x.device))
        return torch.allclose(y, wanted[index % 4], rtol=1e-4, atol=1e-4)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(80)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_layer_that_has_not_chosen_its_dtype_chooses_as_in_its_own_forward(dtype):
    made = [adapted({"linear": four_bit(OUT, IN, torch.float32)}, torch.float32)["linear"] for _ in range(2)]
    for layer in made:
        layer.base_layer.compute_dtype, layer.base_layer.compute_type_is_set = None, False
    x = numbers(dtype, 30, IN)
    found, stock = lora_linear(x, projection(made[0], dtype, x.device)), made[1](x)
    assert found.dtype == stock.dtype
    assert made[0].base_layer.compute_dtype == made[1].base_layer.compute_dtype
    assert made[0].base_layer.compute_type_is_set


def test_eight_bit_state_is_what_its_own_forward_left():
    layer = adapted({"linear": eight_bit(OUT, IN, torch.float32)}, torch.float32)["linear"]
    twin = copy.deepcopy(layer)
    x = numbers(torch.float32, 30, IN).requires_grad_()
    lora_linear(x, projection(layer, x.dtype, x.device)).sum().backward()
    twin(x.detach().requires_grad_()).sum().backward()
    one, other = layer.base_layer, twin.base_layer
    assert torch.equal(one.state.CB, other.state.CB)
    assert torch.equal(one.state.SCB, other.state.SCB)
    assert one.weight.dtype == other.weight.dtype == torch.int8
