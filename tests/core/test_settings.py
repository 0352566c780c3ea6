"""Settings: words of `patch()` and the environment that switch nothing, and reach what they are for."""

from __future__ import annotations

import pytest

from trl_turbo import settings
from trl_turbo.settings import setting


@pytest.fixture
def session(target, new_session, core):
    made = new_session(core.Plugin(core.make_patch(target.name, "rollout.one", "rollout")), features=("rollout",))
    yield made
    made.unpatch()


def test_the_keyword_wins_over_the_environment_and_that_over_the_default(session, monkeypatch):
    session.patch()
    assert setting("rollout_adapter") == "auto"
    monkeypatch.setenv("TRL_TURBO_ROLLOUT_ADAPTER", " Served ")
    session.patch()
    assert setting("rollout_adapter") == "served"
    session.patch(rollout_adapter="merged")
    assert setting("rollout_adapter") == "merged"
    assert setting("rollout_kv_cache_dtype") == "auto"


def test_each_call_states_them_anew_and_leaves_the_patches_alone(session, target):
    module = target.load()
    session.patch(rollout=True, rollout_adapter="merged")
    replaced = module.function
    found = session.patch(rollout=True, rollout_kv_cache_dtype="fp8")
    assert (setting("rollout_adapter"), setting("rollout_kv_cache_dtype")) == ("auto", "fp8")
    assert found["rollout.one"].status == "applied"
    assert module.function is replaced


def test_while_nothing_is_patched_the_environment_is_asked(session, monkeypatch):
    session.patch(rollout_adapter="merged")
    session.unpatch()
    monkeypatch.setenv("TRL_TURBO_ROLLOUT_ADAPTER", "served")
    assert setting("rollout_adapter") == "served"
    monkeypatch.delenv("TRL_TURBO_ROLLOUT_ADAPTER")
    assert setting("rollout_adapter") == "auto"


@pytest.mark.parametrize("word", ["fused", "", True])
def test_another_word_is_one_sentence(word, session, monkeypatch):
    session.patch(rollout_adapter="merged")
    with pytest.raises(ValueError, match="is not known; set auto, merged or served") as told:
        session.patch(rollout_adapter=word)
    assert str(told.value).startswith(f"patch(rollout_adapter={word!r})")
    assert setting("rollout_adapter") == "merged", "a call that raises changes nothing"


def test_another_word_in_the_environment_is_one_sentence(session, monkeypatch):
    monkeypatch.setenv("TRL_TURBO_ROLLOUT_KV_CACHE_DTYPE", "int4")
    sentence = "TRL_TURBO_ROLLOUT_KV_CACHE_DTYPE='int4' in the environment is not known; set auto or fp8"
    with pytest.raises(ValueError, match=sentence):
        session.patch()
    session.patch(rollout_kv_cache_dtype="auto")


def test_misspelt_variables_and_features_of_the_same_name(target, new_session, core, monkeypatch):
    monkeypatch.setenv("TRL_TURBO_ROLLOUT_ADAPTERS", "merged")
    found = new_session(core.Plugin(core.make_patch(target.name, "x.one", "rollout_adapter"))).patch()
    assert [note.text for note in found.notes] == [
        "TRL_TURBO_ROLLOUT_ADAPTERS in the environment switches nothing; did you mean TRL_TURBO_ROLLOUT_ADAPTER?"
    ]
    assert "cannot be a keyword" in found.by_status("failed")[0].reason


def test_patch_has_a_keyword_for_each():
    import inspect

    import trl_turbo

    assert set(settings.WORDS) <= set(inspect.signature(trl_turbo.patch).parameters)
