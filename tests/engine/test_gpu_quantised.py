"""A model in 4 bits on a GPU: CUDA graphs over the trainer's packed weights and scales, the adapter served."""

from __future__ import annotations

import pytest
import torch

from tests.engine import four_bit
from tests.engine.gpu import graphs
from tests.engine.models import quantised
from trl_turbo.engine.four_bit import is_four_bit
from trl_turbo.engine.names import base_weights

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: `tox run -e gpu` needs one", allow_module_level=True)
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


@pytest.fixture
def started(tmp_path, turbo):
    """A shared engine with graphs and its model, with an adapter."""
    from trl_turbo.engine.sizing import Work

    def start(**settings):
        model = four_bit.with_adapter(
            quantised(
                tmp_path,
                "qwen2_tied",
                device="cuda",
                hidden_size=256,
                intermediate_size=512,
                initializer_range=0.05,
                max_position_embeddings=1024,
                **settings,
            )
        )
        llm = turbo(
            model, work=Work(8, 512, 256), kv_cache_memory_bytes=1 << 30, quantization="bitsandbytes"
        )  # as TRL asks for
        assert llm.shared is not None, llm.declined
        return llm, model

    return start


def step(model):
    """An optimizer step's worth of change, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))


def addresses(model):
    """Where weights and scales lie."""
    found = {}
    for name, slot in base_weights(model).items():
        found[name] = slot.parameter.data_ptr()
        if is_four_bit(slot.parameter):
            state = slot.parameter.quant_state
            found[name, "absmax"], found[name, "inner"] = state.absmax.data_ptr(), state.state2.absmax.data_ptr()
    return found


@pytest.mark.parametrize("skip", [None, ["q_proj", "k_proj", "v_proj", "lm_head"]], ids=["nf4", "dynamic"])
def test_graphs_follow_training(skip, started):
    llm, model = started(skip=skip)
    slots = base_weights(model)
    frozen = {name: slot.parameter.detach().clone() for name, slot in slots.items()}
    inside = llm.llm_engine.model_executor.driver_worker.model_runner.model
    theirs = {id(s): p for p in inside.parameters() for s in getattr(p, "bnb_quant_state", {}).values()}
    packed = {name: slot for name, slot in slots.items() if is_four_bit(slot.parameter)}
    assert len(packed) == (14 if skip is None else 8)
    for name, slot in packed.items():
        owner = theirs[id(slot.parameter.quant_state)]
        assert owner.data_ptr() <= slot.parameter.data_ptr() < owner.data_ptr() + owner.numel(), name
        assert slot.parameter.quant_state.nested
    report = llm.memory_report()
    assert graphs(llm) > 0
    assert report.copied_bytes == 0
    assert llm.shared.fold is None
    before = addresses(model)
    four_bit.assert_as_trained(llm, model)
    for _ in range(3):
        step(model)
        llm.refresh()
        four_bit.assert_as_trained(llm, model)
        gap = llm.shared.compare(llm._sample)
        assert gap.reason is None, gap
        print(f"gap to transformers {gap.mean:.4f}, at most {gap.largest:.4f}")
    step(model)
    assert llm.shared.compare(llm._sample).mean > 3 * gap.mean  # control: not pushed
    assert addresses(model) == before
    assert all(torch.equal(slot.parameter, frozen[name]) for name, slot in slots.items())


def test_scales_that_moved_come_back_to_where_graphs_read_them(started):
    llm, model = started()
    before = addresses(model)
    for slot in base_weights(model).values():
        if is_four_bit(slot.parameter):
            state = slot.parameter.quant_state
            state.offset = 1.5 * state.offset  # other tensors, as after a trip to the host
            state.absmax, state.state2.absmax = state.absmax.clone(), 1.5 * state.state2.absmax
    truth = four_bit.by_truth(model)
    assert four_bit.apart(four_bit.by_vllm(llm), truth) < four_bit.SLACK * four_bit.apart(
        four_bit.by_transformers(model), truth
    )
    assert addresses(model) == before
    gap = llm.shared.compare(llm._sample)
    assert gap.reason is None, gap


def test_the_cache_goes_and_the_packed_weights_stay(started):
    llm, model = started()
    before = addresses(model)
    llm.sleep(level=2)
    step(model)
    llm.wake_up()
    llm.refresh()
    four_bit.assert_as_trained(llm, model)
    assert addresses(model) == before
