"""On a GPU: to the bit what bitsandbytes' CUDA kernels give, where LoRA layers ask for it, and beyond 2^31 numbers."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: `tox run -e gpu` needs one", allow_module_level=True)

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("triton")

from bitsandbytes import functional  # noqa: E402

from tests.kernels.dequantise.weights import bits, by_kernel, quantised  # noqa: E402
from trl_turbo.kernels.dequantise import Dequantiser, form, op  # noqa: E402
from trl_turbo.kernels.dequantise.reference import TABLES  # noqa: E402
from trl_turbo.kernels.lora import FourBit  # noqa: E402

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
#: [out, in]: of Qwen2.5-1.5B, of Llama-3.1-8B, and such as no program, word or block divides
SHAPES = [(1536, 1536), (256, 1536), (1536, 8960), (4096, 14336), (777, 1030), (33, 130), (1, 2)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=[True, False], ids=["shuffled", "loaded"])
def lookup(request, monkeypatch):
    monkeypatch.setattr(form, "SHUFFLE", request.param)


@each_dtype
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_is_that_of_bitsandbytes(shape, kind, dtype, lookup):
    for nested in (True, False):
        packed, state = quantised(shape, dtype, kind=kind, nested=nested, device="cuda")
        found = by_kernel(packed, state)
        assert torch.equal(bits(found), bits(functional.dequantize_4bit(packed, state)))


@each_dtype
@pytest.mark.parametrize("blocksize", [32, 128, 256, 512, 1024, 2048, 4096])
def test_blocks_of_other_sizes(blocksize, dtype):
    for storage in (torch.uint8, torch.bfloat16):
        packed, state = quantised((520, 1026), dtype, blocksize=blocksize, device="cuda", storage=storage)
        assert torch.equal(bits(by_kernel(packed, state)), bits(functional.dequantize_4bit(packed, state)))


def test_control_one_scale_of_a_million_is_seen():
    packed, state = quantised((4096, 14336), torch.bfloat16, device="cuda")
    wanted = functional.dequantize_4bit(packed, state)
    state.absmax[500_000] ^= 1
    found = by_kernel(packed, state)
    assert 0 < (found != wanted).sum() <= 64


@each_dtype
def test_layers_take_it_and_not_bitsandbytes(dtype, monkeypatch):
    linear = bnb.nn.Linear4bit(1536, 512, False, dtype, True, "nf4").to(dtype)
    linear.load_state_dict(torch.nn.Linear(1536, 512, bias=False, dtype=dtype).state_dict())
    linear = linear.cuda().requires_grad_(False)
    state = linear.weight.quant_state
    base = FourBit(linear.weight, state, None, dtype, dtype)
    x = torch.randn(64, 1536, device="cuda", dtype=dtype)
    wanted = torch.nn.functional.linear(x, functional.dequantize_4bit(linear.weight, state))
    asked = []
    theirs = functional.dequantize_4bit

    def counted(*args, **kwargs):
        asked.append(args)
        return theirs(*args, **kwargs)

    monkeypatch.setattr(functional, "dequantize_4bit", counted)
    for on in (True, False):
        monkeypatch.setattr(op, "KERNEL", on)
        for _ in range(2):
            assert torch.equal(base.product(x, training=True), wanted)
        assert len(asked) == (0 if on else 2)


def test_a_layer_that_moves_and_comes_back():
    packed, state = quantised((64, 1536), torch.bfloat16, device="cuda")
    weight = torch.nn.Parameter(packed, requires_grad=False)
    dequantise = Dequantiser(weight, state)
    wanted = dequantise(torch.empty(64, 1536, dtype=torch.bfloat16, device="cuda"))
    for device in ("cpu", "cuda"):
        weight.data = weight.data.to(device)
        state.to(torch.device(device))
        found = dequantise(torch.full((64, 1536), torch.nan, dtype=torch.bfloat16, device=device))
        assert torch.equal(found.cuda(), wanted)


def test_beyond_2_31_numbers():
    rows, columns = 32_769, 65_536
    packed = torch.randint(256, (rows * columns // 2, 1), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(rows * columns // 64, device="cuda") + 0.5
    shape = torch.Size([rows, columns])
    state = functional.QuantState(absmax, shape, None, 64, "nf4", torch.float16)
    found = by_kernel(packed, state)
    for row in (0, 1, rows // 2, rows - 2, rows - 1):
        part = packed.view(rows, -1)[row].int()
        nibbles = torch.stack((part >> 4, part & 15), dim=1).view(-1)
        scales = absmax.view(rows, -1)[row].repeat_interleave(64)
        wanted = (torch.tensor(TABLES["nf4"], device="cuda")[nibbles] * scales).half()
        assert torch.equal(found[row], wanted), row
