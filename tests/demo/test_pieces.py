"""The demo's model, tokenizer, lessons and script."""

import io
import random
from pathlib import Path

import pytest
from rich.console import Console

from trl_turbo.demo.tiny import CHARACTERS, SMALLEST_VOCABULARY, make_model, make_tokenizer, save

torch = pytest.importorskip("torch")

SCRIPT = Path(__import__("trl_turbo.demo", fromlist=["demo"]).__file__).with_name("grpo_arithmetic.py")


def test_tokenizer_has_one_token_a_character_and_reads_back() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(CHARACTERS)["input_ids"]
    assert len(ids) == len(CHARACTERS) == len(set(ids))
    assert tokenizer.decode(ids) == CHARACTERS
    assert len(tokenizer) == SMALLEST_VOCABULARY


def test_every_id_of_a_wide_vocabulary_decodes() -> None:
    tokenizer = make_tokenizer(SMALLEST_VOCABULARY + 50)
    assert len(tokenizer) == SMALLEST_VOCABULARY + 50
    assert all(tokenizer.decode([i]) for i in range(len(tokenizer)))


def test_vocabulary_too_small_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^vocab_size has no room .*: it is 10; pass \d+ or more\.$"):
        make_tokenizer(10)


def test_model_is_the_same_from_the_same_seed_and_survives_saving(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = make_tokenizer()
    first, second = (make_model(tokenizer, hidden_size=32, seed=3) for _ in range(2))
    save(tmp_path, first, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path)("12+7=")["input_ids"] == tokenizer("12+7=")["input_ids"]


def test_encode_scores_the_answer_and_nothing_else() -> None:
    from trl_turbo.demo.arithmetic import IGNORED, encode

    tokenizer = make_tokenizer()
    input_ids, attention_mask, labels = encode([(2, 3), (12, 9)], tokenizer)
    assert input_ids.shape == attention_mask.shape == labels.shape == (2, 8)
    for row, text in enumerate(("5", "21")):
        scored = labels[row][labels[row] != IGNORED].tolist()
        assert scored == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert torch.equal(labels[row][labels[row] != IGNORED], input_ids[row][labels[row] != IGNORED])
    assert attention_mask.sum(1).tolist() == [6, 8]
    assert (labels[attention_mask == 0] == IGNORED).all()


def test_lessons_stop_at_the_loss() -> None:
    from trl_turbo.demo.arithmetic import teach_format

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, hidden_size=64)
    steps, loss = teach_format(model, tokenizer, stop_loss=2.0, console=Console(file=io.StringIO()))
    assert steps < 600
    assert loss < 2.0
    steps, loss = teach_format(model, tokenizer, stop_loss=0.0, max_steps=3, console=Console(file=io.StringIO()))
    assert steps == 3
    assert loss > 0


def test_script_is_plain_trl() -> None:
    text = SCRIPT.read_text()
    assert "trl_turbo" not in text
    assert "turbo" not in text


def test_seeds_of_the_lessons_leave_the_global_generator_alone() -> None:
    from trl_turbo.demo.arithmetic import teach_format

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, hidden_size=32)
    random.seed(5)
    expected = random.Random(5).random()
    teach_format(model, tokenizer, max_steps=1, console=Console(file=io.StringIO()))
    assert random.random() == expected
