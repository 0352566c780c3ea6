"""A padded batch as one packed row: which tokens are there, where they go back to, and that none sees another row's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch as replaced

import pytest
import torch
from torch import nn

import trl_turbo
from trl_turbo.compat.sharded import splits_more
from trl_turbo.kernels.attention import Segments
from trl_turbo.patches.attention import check, passes, stand_in
from trl_turbo.patches.attention.layers import attention_layers
from trl_turbo.patches.attention.layout import KEYWORD, Layout, no_mask
from trl_turbo.patches.attention.probe import FARTHEST, window_of
from trl_turbo.patches.attention.rows import Rows, find_rows
from trl_turbo.patches.logprob.request import IGNORED, completion_targets
from trl_turbo.patches.packing.chunks import chunk_ends

from .block_models import make

pytestmark = pytest.mark.trl

PROMPT, COMPLETION = 9, 7
# Name -> tokens of each row's prompt, which prompt it is, and tokens of its completion
BATCHES: dict[str, tuple[list[int], list[int], list[int]]] = {
    "groups": ([9, 9, 5, 5, 5], [0, 0, 1, 1, 1], [7, 3, 4, 1, 7]),
    "mixed-order": ([6, 9, 6, 9], [0, 1, 0, 1], [2, 7, 7, 5]),
    "group-of-one": ([9, 4, 7], [0, 1, 2], [7, 2, 5]),
    "one-row": ([9], [0], [7]),
    "one-token": ([1, 1], [0, 0], [1, 1]),
    "empty-completion": ([5, 5, 8], [0, 0, 1], [0, 4, 0]),
    "same-tokens-other-padding": ([4, 3], [0, 0], [7, 7]),
}


def batch(name: str, vocab: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and positions [B, L]: prompts padded on the left, completions on the right."""
    prompts, which, completions = BATCHES[name]
    numbers = torch.Generator().manual_seed(len(name))
    words = torch.randint(1, vocab, (len(prompts), PROMPT), generator=numbers)
    ids = torch.randint(1, vocab, (len(prompts), PROMPT + COMPLETION), generator=numbers)
    ids[:, :PROMPT] = words[torch.tensor(which)]
    column = torch.arange(PROMPT + COMPLETION).expand_as(ids)
    mask = (column >= PROMPT - torch.tensor(prompts)[:, None]) & (column < PROMPT + torch.tensor(completions)[:, None])
    return ids * mask, mask.long(), column


def rows_of(name: str, *, share: bool = True) -> tuple[Rows, torch.Tensor]:
    ids, mask, column = batch(name)
    targets = completion_targets(COMPLETION)(ids, mask)
    rows = find_rows(ids, mask, targets, column, share=share, reach=True)
    assert isinstance(rows, Rows)
    return rows, targets


def sequences(rows: Rows, values: torch.Tensor) -> list[list[int]]:
    """What each segment of the packed row is, its prefix in front of it."""
    parts = rows.pack(values)[0].split([*rows.segments.lengths])
    return [
        [*(parts[p].tolist() if p >= 0 else []), *part.tolist()]
        for p, part in zip(rows.segments.prefix, parts, strict=True)
    ]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", BATCHES)
def test_every_asked_token_follows_its_own_row(name: str, share: bool) -> None:
    """Each target's segment, with its prefix, is the row's tokens up to there; checked a token at a time."""
    rows, targets = rows_of(name, share=share)
    ids, mask, column = batch(name)
    at, asked, ends = rows.pack(column)[0], rows.pack(targets)[0], 0
    found: dict[tuple[int, int], list[int]] = {}
    everything = sequences(rows, ids)
    for length, whole in zip(rows.segments.lengths, everything, strict=True):
        for offset in range(length):
            place = ends + offset
            if asked[place] != IGNORED:
                key = divmod(int(rows.index[place]), ids.shape[1])
                found[key] = whole[: len(whole) - length + offset + 1]
                assert at[place] == key[1]
        ends += length
    expected = {
        (int(row), int(col)): ids[row, : col + 1][mask[row, : col + 1] != 0].tolist()
        for row, col in (targets != IGNORED).nonzero()
    }
    assert found == expected
    assert torch.equal(rows.spread(rows.pack(targets)) * (targets != IGNORED), targets * (targets != IGNORED))


def test_a_shared_prompt_is_there_once() -> None:
    # All but the prompt's last token, which each row has to itself: what is asked of it differs
    assert rows_of("groups")[0].segments.lengths == (8, 7, 3, 4, 4, 1, 7, 1)
    assert rows_of("groups")[0].segments.prefix == (-1, 0, 0, -1, 3, 3, 3, -1)
    assert max(rows_of("group-of-one")[0].segments.prefix) == -1
    assert max(rows_of("same-tokens-other-padding")[0].segments.prefix) == -1  # other columns are other positions
    assert max(rows_of("groups", share=False)[0].segments.prefix) == -1


def test_what_nobody_reads_is_left_out() -> None:
    """Padding, last tokens and rows without an answer; the longest position stays, for embeddings that look at it."""
    rows, targets = rows_of("empty-completion")
    assert rows.segments.lengths == (5 + 3, 1)
    assert rows.pack(batch("empty-completion")[2])[0, -1] == PROMPT + COMPLETION - 1
    ids, mask, column = batch("groups")
    assert find_rows(ids, mask, torch.full_like(targets[:1], IGNORED), column, share=True, reach=True) is None


def test_padding_between_tokens_is_told() -> None:
    ids, mask, column = batch("groups")
    mask[0, 11] = 0
    rows = find_rows(ids, mask, completion_targets(COMPLETION)(ids, mask), column, share=True, reach=True)
    assert isinstance(rows, str), "the token before a hole is asked about the one behind it"
    targets = completion_targets(COMPLETION)(ids, mask)
    targets[0, 11] = IGNORED
    rows = find_rows(ids, mask, targets, column, share=True, reach=True)
    assert isinstance(rows, Rows)
    assert rows.holes
    assert not rows_of("groups")[0].holes


def test_a_hash_that_collides_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash only proposes; what is shared was compared."""
    monkeypatch.setattr("trl_turbo.patches.attention.rows._MULTIPLIER", 0)
    ids, mask, column = batch("group-of-one")
    rows = find_rows(ids, mask, completion_targets(COMPLETION)(ids, mask), column, share=True, reach=True)
    assert isinstance(rows, Rows)
    assert max(rows.segments.prefix) == -1


def test_chunks_of_tokens() -> None:
    """A padded row has 16 columns; rows are 9 + 7 tokens, 3 more of that prompt, 5 + 4, 1 and 7 more of this one."""
    ids, mask, _ = batch("groups")
    assert chunk_ends(ids, mask, COMPLETION, 2, share=True) == [4, 5]
    assert chunk_ends(ids, mask, COMPLETION, 2, share=False) == [2, 5]
    assert chunk_ends(ids, mask, COMPLETION, 1, share=True) == [1, 2, 4, 5]


# What a token sees ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _packing() -> None:
    trl_turbo.patch(verbose=False, packing=True)


def logps(model: Any, embeddings: torch.Tensor, rows: Rows, column: torch.Tensor, segments: Segments) -> torch.Tensor:
    """The largest logit [T + P] of each token of a packed row, from embeddings [1, T + P, H]."""
    layout = Layout(segments, rows.onlookers)
    kwargs = {KEYWORD: layout, "attention_mask": no_mask(embeddings.device), "use_cache": False}
    return model(inputs_embeds=embeddings, position_ids=rows.pack(column), **kwargs).logits[0].amax(-1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("control", [False, True], ids=["", "control"])
def test_no_gradient_leaks_to_another_sequence(family: str, control: bool) -> None:
    """The gradient of a token's output at another row's embeddings is zero, not small; its own prefix has one."""
    model = make(family)
    rows, _ = rows_of("groups")
    ids, _, column = batch("groups")
    assert check.verdict_of(model, type(model).forward, "packing.passes", True, ids.device)[0] is not None
    segments = rows.segments
    if control:  # one sequence instead of many
        segments = Segments.build([rows.segments.total])
    embeddings = model.get_input_embeddings()(rows.pack(ids)).detach().requires_grad_()
    outputs = logps(model, embeddings, rows, column, segments)
    starts = [sum(rows.segments.lengths[:i]) for i in range(len(rows.segments.lengths))]
    leaked = False
    for i, (start, length) in enumerate(zip(starts, rows.segments.lengths, strict=True)):
        (grad,) = torch.autograd.grad(outputs[start + length - 1], embeddings, retain_graph=True)
        seen = grad[0].abs().amax(-1) > 0
        own = torch.zeros_like(seen)
        for j in (i, rows.segments.prefix[i]):
            if j >= 0:
                own[starts[j] : starts[j] + rows.segments.lengths[j]] = True
        leaked |= bool((seen & ~own).any())
        assert seen[start + length - 1]
        if rows.segments.prefix[i] >= 0:
            assert seen[starts[rows.segments.prefix[i]]]
    assert leaked == control


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", ["groups", "empty-completion"])
def test_onlookers_see_their_row_as_padding_does(family: str, name: str) -> None:
    """What a trainer reads at padding is stock's: a token that sees its row, not itself, and that nobody sees."""
    model = make(family)
    ids, mask, _ = batch(name, 200)
    targets = completion_targets(COMPLETION, masked=False)(ids, mask)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.amax(-1)
        found = passes.arrange(
            "packing", model, type(model).forward, (), {"input_ids": ids, "attention_mask": mask}, targets
        )
        assert found is not None
        assert found.layout.onlookers is not None
        ours = found.spread(model(**found.kwargs).logits.amax(-1))
    asked = targets != IGNORED
    assert (asked & (mask == 0)).any()
    assert (ours - plain)[asked].abs().max() <= 64 * torch.finfo(torch.float32).eps * plain.abs().max()
    assert (ours != 0)[asked].all()


# Models that must be left alone --------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A convolution over tokens around a layer's attention, as of models with a state along the sequence."""

    def __init__(self, inner: nn.Module, strength: float) -> None:
        super().__init__()
        self.inner, self.strength = inner, strength

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner(hidden, *args, **kwargs) + self.strength * hidden.roll(1, 1)


def convolved(model: Any) -> None:
    model.model.layers[0].mlp = Mixed(model.model.layers[0].mlp, 0.2)


def attention_dropout(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()


def bidirectional(model: Any) -> None:
    file = sys.modules[type(model).__module__]
    causal = file.create_causal_mask
    file.create_causal_mask = lambda **kwargs: causal(**kwargs, or_mask_function=lambda b, h, q, k: q >= 0)


def sinks(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.sinks = nn.Parameter(torch.zeros(4))


def flash(model: Any) -> None:
    model.config._attn_implementation_internal = "flash_attention_2"


def own_forward(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward


def replica(model: Any) -> None:
    model._is_replica = True


def flattened(model: Any) -> None:
    model.model.layers[0].mlp.__class__ = type("FullyShardedDataParallel", (type(model.model.layers[0].mlp),), {})


def sharded_integers(model: Any) -> None:
    layer = model.model.layers[0].self_attn
    layer.codes = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    partitioned(model)


def unlike_kinds(model: Any) -> None:
    model.config.layer_types = ["full_attention", "linear_attention"]


def mask_of_its_own(model: Any) -> None:
    backbone = model.model
    inner = type(backbone).forward

    def forward(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if KEYWORD not in kwargs:
            length = kwargs["input_ids"].shape[1]
            attention_mask = torch.zeros(1, 1, length, length).masked_fill(
                ~torch.ones(length, length, dtype=torch.bool).tril(), torch.finfo(torch.float32).min
            )
        return inner(self, *args, attention_mask=attention_mask, **kwargs)

    backbone.__class__ = type("Backbone", (type(backbone),), {"forward": forward})


DECLINED: dict[str, tuple[Callable[[Any], None], str]] = {
    "convolution": (convolved, "something else than its attention may pass between tokens"),
    "attention-dropout": (attention_dropout, "drops out 0.1 of its attention weights"),
    "bidirectional": (bidirectional, "neither causal nor a sliding window"),
    "sinks": (sinks, "attention sinks"),
    "flash": (flash, "'flash_attention_2' is the script's choice"),
    "own-forward": (own_forward, "a forward of its own on the instance"),
    "replica": (replica, "nn.DataParallel"),
    "fsdp1": (flattened, "FSDP in its first version"),
    "sharded-integers": (sharded_integers, "its sharded parameters are not all numbers (`codes`)"),
    "linear-attention": (unlike_kinds, "other kinds too (linear_attention)"),
    "own-mask": (mask_of_its_own, "a mask that the model makes by itself"),
}


def arranged(model: Any, **kwargs: Any) -> tuple[Any, str]:
    ids, mask, _ = batch("groups", 200)
    targets = completion_targets(COMPLETION)(ids, mask)
    given = {"input_ids": ids, "attention_mask": mask, **kwargs}
    before = len(trl_turbo.status().notes)
    found = passes.arrange("packing", model, type(model).forward, (), given, targets)
    return found, " ".join(note.text for note in trl_turbo.status().notes[before:])


@pytest.mark.parametrize("change", DECLINED)
def test_declined(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "create_causal_mask", modeling_llama.create_causal_mask)  # for what changes it
    model = make("llama")
    assert arranged(model)[0] is not None, "what is changed is what is declined"
    model = make("llama")
    change_model, reason = DECLINED[change]
    change_model(model)
    found, notes = arranged(model)
    assert found is None
    assert reason in notes


# Models that are sharded ---------------------------------------------------------------------------------------------


def partitioned(model: Any) -> None:
    """As ZeRO-3 leaves parameters between calls: empty, with a mark and the shape that they have when gathered."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        parameter.data = parameter.data.new_empty(0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
def test_sharded_models_qualify(family: str) -> None:
    """No parameter is there to compute with, and none is needed to find out about the code."""
    whole, model = make(family), make(family)
    partitioned(model)
    of_whole, _ = arranged(whole)
    found, notes = arranged(model)
    assert found is not None, notes
    assert found.layers == of_whole.layers
    assert found.layout.softcap == of_whole.layout.softcap
    assert all(parameter.numel() == 0 for parameter in model.parameters())


@pytest.mark.parametrize("change", [name for name in DECLINED if name != "sharded-integers"])
def test_sharded_models_are_declined_for_the_same_reasons(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "create_causal_mask", modeling_llama.create_causal_mask)  # for what changes it
    model = make("llama")
    change_model, reason = DECLINED[change]
    change_model(model)
    partitioned(model)
    found, notes = arranged(model)
    assert found is None
    assert reason in notes


def test_sharded_model_with_a_forward_on_an_instance_is_declined() -> None:
    """Whatever such a function holds on to, it is the sharded module's."""
    model = make("llama")
    layer = model.model.layers[1].mlp
    layer.forward = lambda x: type(layer).forward(layer, x)
    partitioned(model)
    found, notes = arranged(model)
    assert found is None
    assert "its LlamaMLP has a forward of its own on the instance" in notes


def test_stand_in_takes_the_memory_of_a_layer_and_tells_projections_apart() -> None:
    model = make("llama")
    one, layers = model.model.layers[0], len(model.model.layers)
    assert layers > 1
    partitioned(model)
    found = stand_in.stand_in(model, torch.device("cpu"))
    assert not any(found_module in set(model.modules()) for found_module in found.modules())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in found.parameters()}
    shapes = {(tuple(p.ds_shape), "bias" in name) for name, p in model.named_parameters()}
    assert len(storages) <= len(shapes) + 1  # an embedding may have the shape of another matrix
    spare = stand_in._APART * stand_in._WINDOWS * 4
    layer_bytes = 4 * sum(p.ds_shape.numel() for p in one.parameters())
    assert sum(storages.values()) <= layer_bytes + (len(storages) + 1) * spare
    attention = found.model.layers[0].self_attn
    assert not torch.equal(attention.k_proj.weight, attention.v_proj.weight)
    again = stand_in.stand_in(model, torch.device("cpu"))
    for ours, theirs in zip(found.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), "processes must come to the same verdict"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "mixed"])
def test_stand_in_for_fsdp2(dtype: torch.dtype | None) -> None:
    """Plain classes without FSDP's hooks, in the dtype that it gathers parameters in; the model is as it was."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if dist.is_initialized():
        pytest.skip("another test holds a process group")
    model = make("llama")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        form: dict[str, Any] = {
            "mesh": dist.init_device_mesh("cpu", (1,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype),
        }
        for block in model.model.layers:
            fully_shard(block, **form)
        fully_shard([model.model.norm, model.lm_head], **form, reshard_after_forward=False)
        fully_shard(model, **form)
        found = stand_in.stand_in(model, torch.device("cpu"))
        for ours, theirs in zip(found.modules(), model.modules(), strict=True):
            assert not isinstance(ours, FSDPModule)
            assert not ours._forward_pre_hooks
            assert not ours._forward_hooks
            assert isinstance(theirs, type(ours))
        for ours, theirs in zip(found.parameters(), model.parameters(), strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype == (dtype or torch.float32)
            assert type(theirs.data).__name__ == "DTensor"
        answer, notes = arranged(model)
        assert answer is not None, notes
        kinds = {type(layer) for layer in attention_layers(found)}
        assert not any(issubclass(kind, FSDPModule) for kind in kinds)
        assert isinstance(model, FSDPModule)
    finally:
        dist.destroy_process_group()


def test_more_than_parameters_is_split() -> None:
    """Queries, keys and values of a process are then not those that the stand-in has."""
    for names, split in (
        (None, False),
        (("dp_replicate", "dp_shard"), False),
        (("dp_shard_cp",), True),
        (("tp",), True),
    ):
        tensor = SimpleNamespace(device_mesh=SimpleNamespace(mesh_dim_names=names))
        assert splits_more(tensor) == split


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"pixel_values": torch.zeros(1)}, "`pixel_values`"),
        ({"token_type_ids": torch.zeros(5, 16)}, "`token_type_ids`"),
        ({"attention_mask": torch.ones(5, 1, 16, 16)}, "a mask of its own"),
        ({"position_ids": torch.zeros(3, 5, 16)}, "more than one coordinate"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(5, 16, 8)}, "something else than ids"),
        ({"output_router_logits": True}, "load-balancing loss"),
    ],
)
def test_declined_calls(kwargs: dict[str, Any], reason: str) -> None:
    found, notes = arranged(make("llama"), **kwargs)
    assert found is None
    assert reason in notes


@pytest.mark.parametrize("kind", ["MambaConfig", "GPT2Config", "BloomConfig", "OPTConfig"])
def test_other_architectures(kind: str) -> None:
    """A state along the sequence, positions from the mask, a bias by distance; learned positions are as good as any.

    GPT-2 of transformers 4 hands its layers no keywords: the mask without a place to put it says so.
    """
    import transformers

    config = getattr(transformers, kind)(vocab_size=211, hidden_size=32, num_hidden_layers=2, pad_token_id=0)
    for name, value in {"num_attention_heads": 4, "n_head": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    found, notes = arranged(model)
    fits = kind == "GPT2Config" and int(transformers.__version__.partition(".")[0]) >= 5
    assert (found is not None) == fits, notes


def test_a_layer_that_is_not_reached_is_an_error() -> None:
    """What a layer would compute without the layout must not be trained on."""
    model = make("llama")
    found, _ = arranged(model)
    found.layout.calls = 1
    with pytest.raises(RuntimeError, match="1 of 2 attention layers"):
        found.ran()


@pytest.mark.parametrize("window", [None, 1, 16, 5000])
def test_windows_are_read_off_masks(window: int | None) -> None:
    def mask(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        causal = k <= q
        return causal if window is None else causal & (k > q - window)

    assert window_of(mask) == window
    with pytest.raises(NotImplementedError, match="in chunks"):
        window_of(lambda batch, head, q, k: (k <= q) & (k // 4096 == q // 4096))
    with pytest.raises(NotImplementedError, match="neither causal"):
        window_of(lambda batch, head, q, k: k >= 0)
    assert window is None or window < FARTHEST


@pytest.mark.parametrize("answer", [6, 300])
def test_a_full_batch_is_packed_where_it_pays(answer: int) -> None:
    """Without padding, and with a prompt too short to matter, rows stay as they are: attention is told they are."""
    model = make("llama")
    ids = torch.randint(3, 200, (4, 10 + answer), generator=torch.Generator().manual_seed(1))
    ids[:, :10] = ids[0, :10].clone()
    targets = completion_targets(answer)(ids, None)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = passes.arrange("packing", model, type(model).forward, (), given, targets)
    assert found is not None
    if answer == 6:
        assert found.rows is not None
        assert found.layout.segments.lengths == (9, 6, 6, 6, 6, 1)
    else:
        assert found.rows is None
        assert found.layout.segments.lengths == (310,) * 4
        assert found.kwargs["input_ids"] is ids
    with torch.no_grad():
        ours = found.spread(model(**found.kwargs).logits.amax(-1))
        plain = model(input_ids=ids, use_cache=False).logits.amax(-1)
    asked = targets != IGNORED
    assert (ours - plain)[asked].abs().max() <= 64 * torch.finfo(torch.float32).eps * plain.abs().max()


def test_dropout_ends_sharing() -> None:
    model = make("llama")
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.1))
    for training, shared in ((True, False), (False, True)):
        model.train(training)
        found, notes = arranged(model)
        assert (max(found.layout.segments.prefix) >= 0) == shared
        assert ("dropped out" in notes) == training


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = make("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(1)
    state, before = torch.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
    assert arranged(model)[0] is not None
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.config._attn_implementation == "eager"
    with replaced.object(check, "_examine", side_effect=AssertionError("asked twice")):
        assert arranged(model)[0] is not None
