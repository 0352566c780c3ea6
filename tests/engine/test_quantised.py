"""A model in 4 bits and its adapter: packed weights and their scales are vLLM's own, and answers follow training."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from tests.engine import four_bit
from tests.engine.conftest import shut_down
from tests.engine.four_bit import SLACK, assert_as_trained, with_adapter
from tests.engine.greedy import train
from tests.engine.models import quantised, saved
from trl_turbo.engine.four_bit import is_four_bit
from trl_turbo.engine.names import base_weights

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

WHOLE_GROUP = ["q_proj", "k_proj", "v_proj", "lm_head"]
CASES = {
    "nf4, scales quantised too": ("qwen2_tied", {}),
    "nf4": ("llama", {"bnb_4bit_use_double_quant": False}),
    "dynamic: a group and a linear in 16 bits": ("qwen2", {"skip": [*WHOLE_GROUP, "model.layers.1.mlp.down_proj"]}),
    "fp4 multiplied in float32, joined on disk": (
        "phi3",
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    ),
}


@pytest.fixture
def sharing(turbo, monkeypatch):
    """Starts an engine that shares, or fails."""
    pytest.importorskip("vllm")
    from trl_turbo.engine.errors import EngineDeclinedError

    try:
        import trl_turbo.engine.four_bit_config  # noqa: F401
    except EngineDeclinedError as error:
        pytest.skip(str(error))
    from trl_turbo.engine.serving import alone

    def start(model, **kwargs):
        with alone():  # no engine of TRL's where it is declined: that one takes its time
            llm = turbo(model, **{"quantization": "bitsandbytes", **kwargs})  # as TRL asks for
        assert llm.shared is not None
        return llm

    return start


def inside(llm):
    return llm.llm_engine.model_executor.driver_worker.model_runner.model


def scale_bytes(state):
    inner = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return sum(tensor.numel() * tensor.element_size() for tensor in (state.absmax, state.code, *inner))


@pytest.mark.vllm
@pytest.mark.parametrize("case", CASES)
def test_packed_weights_and_their_scales_are_shared_and_the_adapter_is_served(case, tmp_path, sharing):
    import trl_turbo

    family, settings = CASES[case]
    model = with_adapter(quantised(tmp_path, family, **{"initializer_range": 0.08, **settings}))
    slots = base_weights(model)
    packed = {name: slot for name, slot in slots.items() if is_four_bit(slot.parameter)}
    parameters = {name: slot.parameter for name, slot in slots.items()}
    states = {name: slot.parameter.quant_state for name, slot in packed.items()}
    before = {name: four_bit.values(slot.parameter) for name, slot in slots.items()}
    assert 0 < len(packed) < len(slots)
    report = trl_turbo.patch(logprob=False, rollout=True, verbose=False)
    llm = sharing(model)
    trl_turbo.unpatch()

    assert len(llm.shared.weights) == len(slots)
    theirs = dict(inside(llm).named_parameters())
    ranges = [(p.data_ptr(), p.data_ptr() + p.numel() * p.data.element_size()) for p in theirs.values()]
    for name, slot in slots.items():
        assert slot.parameter is parameters[name], name  # the objects that PEFT and bitsandbytes hold
        assert torch.equal(four_bit.values(slot.parameter), before[name]), name
        assert any(start <= slot.parameter.data_ptr() < end for start, end in ranges), name
    held = {}
    for parameter in theirs.values():
        shards = getattr(parameter, "bnb_quant_state", {})
        assert sorted(shards) == list(range(len(shards)))
        for i, state in shards.items():
            start, end = parameter.bnb_shard_offsets[i : i + 2].tolist()
            held[id(state)] = parameter.data[start:end]
    for name, slot in packed.items():
        assert slot.parameter.quant_state is states[name] is slot.module.quant_state
        rows = held.pop(id(states[name]))
        assert rows.data_ptr() == slot.parameter.data_ptr()
        assert rows.shape == slot.parameter.shape
        assert states[name].nested == settings.get("bnb_4bit_use_double_quant", True)
    assert not held
    memory = llm.memory_report()
    weights = sum(p.numel() * p.element_size() for p in parameters.values())
    assert memory.shared_bytes == weights + sum(map(scale_bytes, states.values()))
    assert memory.copied_bytes == 0
    assert llm.shared.fold is None
    assert [note.text for note in report.notes if "because the base is quantised" in note.text]

    assert_as_trained(llm, model)
    for steps in (3, 1):
        train(model, steps=steps, lr=0.01)
        stale = four_bit.apart(four_bit.by_vllm(llm), four_bit.by_truth(model))
        assert steps == 1 or stale > 0.05  # control: not pushed
        llm.refresh()
        assert_as_trained(llm, model)
    assert llm.shared.compare(llm._sample).reason is None
    assert llm.shared.check() == 0


@pytest.mark.vllm
def test_a_float16_model_is_held_to_the_bfloat16_in_which_vllm_multiplies(tmp_path, sharing):
    from trl_turbo.engine.parity import TOLERANCE

    model = quantised(tmp_path, "llama", dtype=torch.float16, bnb_4bit_compute_dtype=torch.float16)
    llm = sharing(model)
    assert llm.shared.compare(llm._sample).tolerance == TOLERANCE[torch.bfloat16]
    truth, ours = four_bit.by_truth(model), four_bit.by_vllm(llm)
    in_float16 = four_bit.apart(four_bit.by_transformers(model), truth)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.bfloat16
    in_bfloat16 = four_bit.apart(four_bit.by_transformers(model), truth)
    assert SLACK * in_float16 < four_bit.apart(ours, truth) < SLACK * in_bfloat16


@pytest.mark.vllm
def test_saving_copying_and_checkpoints_in_4_bits(tmp_path, sharing):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = with_adapter(quantised(tmp_path / "16", "qwen2_tied", initializer_range=0.08))
    llm = sharing(model)
    train(model, lr=0.01)
    llm.refresh()
    pointers = {name: slot.parameter.data_ptr() for name, slot in base_weights(model).items()}

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantised(tmp_path / "other", "qwen2_tied", initializer_range=0.08),
                                      tmp_path / "adapter")  # fmt: skip
    assert four_bit.apart(four_bit.by_transformers(again), four_bit.by_transformers(model)) < 1e-2

    twin = copy.deepcopy(model)
    mine = {slot.parameter.untyped_storage().data_ptr() for slot in base_weights(model).values()}
    assert not mine & {slot.parameter.untyped_storage().data_ptr() for slot in base_weights(twin).values()}
    expected = four_bit.by_transformers(twin)
    train(twin, lr=0.01)
    assert_as_trained(llm, model)
    assert torch.equal(four_bit.by_transformers(model), expected)

    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert any(name.endswith("nested_absmax") for name in state)
    model.load_state_dict(twin.state_dict(), strict=False)  # bitsandbytes loads no states there
    llm.refresh()
    assert_as_trained(llm, model)
    model.load_state_dict(state, strict=False)
    assert {name: slot.parameter.data_ptr() for name, slot in base_weights(model).items()} == pointers

    # A base that was quantised before it was saved: vLLM finds a quantisation in its configuration
    model.unload().save_pretrained(tmp_path / "4")
    from tests.engine.conftest import shut_down
    from tests.engine.models import tokenizer

    shut_down(llm)
    tokenizer().save_pretrained(tmp_path / "4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "4", dtype=torch.bfloat16)
    assert all(
        torch.equal(four_bit.values(a.parameter), four_bit.values(b.parameter))
        for a, b in zip(base_weights(model).values(), base_weights(loaded).values(), strict=True)
    )
    llm = sharing(loaded)
    assert len(llm.shared.weights) == len(base_weights(loaded))
    assert_as_trained(llm, loaded)


@pytest.mark.vllm
def test_what_was_quantised_anew_comes_back_to_its_place(tmp_path, sharing):
    from trl_turbo.engine.errors import WeightsMovedError

    model = quantised(tmp_path, "qwen2_tied", initializer_range=0.08)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True  # as on a CPU that has it, where each forward pass would repack
    llm = sharing(model)
    assert_as_trained(llm, model)
    assert llm.shared.check() == 0
    linear = model.model.layers[0].self_attn.k_proj
    address, state, scales = linear.weight.data_ptr(), linear.weight.quant_state, linear.weight.quant_state.absmax

    def quantise(**settings):
        """As PEFT's merge does: another parameter, other bytes, another state."""
        dense = four_bit.values(linear.weight).to(torch.bfloat16) * 1.5
        linear.weight = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4", module=linear, **settings).to(
            "cpu"
        )

    quantise()
    assert linear.weight.data_ptr() != address
    wanted = four_bit.by_truth(model)
    ours = four_bit.by_vllm(llm)  # generate() notices by itself
    assert four_bit.apart(ours, wanted) < SLACK * four_bit.apart(four_bit.by_transformers(model), wanted)
    assert linear.weight.data_ptr() == address
    assert linear.weight.quant_state is linear.quant_state is state
    assert state.absmax is scales
    assert torch.equal(four_bit.by_truth(model), wanted)

    # As moving the model to the host and back does: the same state with other tensors, where graphs would not look
    state.absmax, state.state2.absmax = state.absmax.clone(), state.state2.absmax.clone()
    assert llm.shared.check() == 1
    assert state.absmax is scales
    assert llm.shared.check() == 0
    assert_as_trained(llm, model)

    # Other parameters, which know no state: bitsandbytes finds it on the module
    loaded = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(loaded, strict=False, assign=True)
    assert linear.weight.data_ptr() != address
    four_bit.by_vllm(llm)
    assert linear.weight.data_ptr() == address
    assert linear.weight.quant_state is state
    assert_as_trained(llm, model)

    for settings in ({"blocksize": 128}, {"compress_statistics": False}):
        quantise(**settings)
        with pytest.raises(WeightsMovedError, match=r"k_proj.weight was quantised in another way .* build the trainer"):
            four_bit.by_vllm(llm)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("skip", "joined", "left"),
    [
        (["q_proj", "lm_head"], "q_proj, k_proj, v_proj", "self_attn.q_proj"),
        (["up_proj", "lm_head"], "gate_proj, up_proj", "mlp.up_proj"),
    ],
)
def test_a_group_that_is_partly_in_16_bits_is_declined(skip, joined, left, tmp_path, sharing):
    from trl_turbo.engine.errors import EngineDeclinedError

    with pytest.raises(EngineDeclinedError) as caught:
        sharing(quantised(tmp_path, "llama", skip=skip))
    assert f"model.layers.0.{left} is left in 16 bits" in str(caught.value)
    assert f"vLLM keeps {joined} in one tensor; put all of them into llm_int8_skip_modules" in str(caught.value)


@pytest.mark.vllm
def test_merging_into_4_bits_and_a_missing_plugin_are_declined(tmp_path, sharing, monkeypatch):
    from trl_turbo.engine.errors import EngineDeclinedError

    model = with_adapter(quantised(tmp_path, "qwen2_tied"))
    monkeypatch.setenv("TRL_TURBO_ROLLOUT_ADAPTER", "merged")
    with pytest.raises(EngineDeclinedError, match="into a base in 16 or 32 bits, and the model's is quantised"):
        sharing(model)
    monkeypatch.delenv("TRL_TURBO_ROLLOUT_ADAPTER")
    monkeypatch.delitem(sys.modules, "trl_turbo.engine.four_bit_config")
    monkeypatch.delattr("trl_turbo.engine.four_bit_config")
    for name in ("vllm.model_executor.layers.quantization.bitsandbytes", "vllm_bnb_plugin.bitsandbytes"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineDeclinedError, match="run pip install vllm-bnb-plugin"):
        sharing(model)


@pytest.mark.vllm
def test_a_dequantised_model_of_a_quantised_checkpoint_is_never_taken_for_shared(tmp_path, sharing):
    """For such a checkpoint vLLM takes a loader of its own, and would sample from a copy."""
    from transformers import AutoModelForCausalLM

    from tests.engine.models import tokenizer
    from trl_turbo.engine.errors import EngineDeclinedError

    quantised(tmp_path / "16", "llama").save_pretrained(tmp_path / "4")
    tokenizer().save_pretrained(tmp_path / "4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "4", dtype=torch.bfloat16).dequantize()
    with pytest.raises(EngineDeclinedError, match="took another loader"):
        sharing(model, quantization=None)


@pytest.mark.vllm
@pytest.mark.usefixtures("one_process")
def test_from_pretrained_in_4_bits(tmp_path, request):
    pytest.importorskip("vllm")
    from peft import LoraConfig, get_peft_model

    import trl_turbo

    saved(tmp_path, "qwen2_tied", dtype=torch.bfloat16, initializer_range=0.05)
    model, _ = trl_turbo.from_pretrained(
        tmp_path, fast_inference=True, load_in_4bit=True, max_lora_rank=8, max_num_seqs=4
    )
    llm = model.fast_generate.llm
    request.addfinalizer(lambda: shut_down(llm))
    assert len(llm.shared.weights.packed) == 14
    assert llm.memory_report().copied_bytes == 0
    before = model.fast_generate([[5, 6, 7]], use_tqdm=False)[0].outputs[0].token_ids
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    after = adapted.fast_generate([[5, 6, 7]], use_tqdm=False)[0].outputs[0].token_ids
    assert list(after) != list(before)
    assert llm.shared.compare(llm._sample).reason is None


def declined(model, **kwargs):
    from trl_turbo.engine import checks

    return checks.declined(model, kwargs) or ""


def test_what_vllm_reads_otherwise_is_declined_in_words(tmp_path):
    assert declined(quantised(tmp_path, "llama"), quantization="bitsandbytes") == ""
    assert "quantization='fp8'" in declined(quantised(tmp_path, "llama"), quantization="fp8")
    assert "lm_head.weight is in 4 bits" in declined(quantised(tmp_path, "llama", skip=["down_proj"]))
    stored = quantised(tmp_path, "llama", bnb_4bit_quant_storage=torch.bfloat16)
    assert "keeps its 4-bit values in bfloat16" in declined(stored)
    # bitsandbytes rebinds a bias in its forward pass, before which the dtypes still agree
    assert "bias of model.layers.0.self_attn.q_proj float32" in declined(
        quantised(tmp_path, "qwen2", bnb_4bit_compute_dtype=torch.float32)
    )
    repacked = quantised(tmp_path, "llama")
    repacked.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    assert "repacked model.layers.0.mlp.up_proj.weight for this CPU" in declined(repacked)


def test_float32_beside_4_bits_is_declined_in_words(tmp_path):
    from peft import prepare_model_for_kbit_training

    prepared = prepare_model_for_kbit_training(quantised(tmp_path, "llama"), use_gradient_checkpointing=False)
    assert "prepare_model_for_kbit_training leaves them" in declined(prepared)
    assert "in float32" in declined(quantised(tmp_path, "llama", dtype=torch.float32))


def test_8_bits_are_declined_in_words(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tests.engine.models import saved

    saved(tmp_path, "llama", dtype=torch.bfloat16)
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"})
    assert "8 bits" in declined(model)


@pytest.mark.vllm
def test_what_vllm_is_told(tmp_path):
    pytest.importorskip("vllm")
    from tests.engine.conftest import trl_arguments
    from trl_turbo.engine.serving import Trainee
    from trl_turbo.engine.sizing import Work
    from trl_turbo.engine.start import prepare

    model = with_adapter(quantised(tmp_path, "llama", skip=WHOLE_GROUP))
    given = {**trl_arguments(model), "quantization": "bitsandbytes", "hf_overrides": {"rope_theta": 1e4}}
    start = prepare(Trainee(model, None, Work(4, 16, 32)), given)
    linears = {
        name.removeprefix("base_model.model.").replace(".base_layer", "")
        for name, module in model.named_modules()
        if type(module) is bnb.nn.Linear4bit
    }
    overrides = start.llm_kwargs["hf_overrides"]
    assert set(overrides["quantization_config"]["four_bit"]) == linears
    assert len(linears) == 2 * 4
    assert overrides["rope_theta"] == 1e4
    assert start.llm_kwargs["quantization"] == overrides["quantization_config"]["quant_method"] != "bitsandbytes"
    assert start.llm_kwargs["dtype"] == "bfloat16"
    config = model.config
    # Keys and values in two bytes each, though most weights have elements of one
    assert start.plan.token_bytes == 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
