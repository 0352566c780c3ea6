"""Keywords, environment switches, a second call with others, strict, and blocked rows."""

from __future__ import annotations

import sys

import pytest

import trl_turbo
from trl_turbo import PatchError, _features
from trl_turbo.hookspecs import hookimpl
from trl_turbo.patching import Replacement


class Raises:
    @hookimpl
    def turbo_patches(self, env):
        raise OSError("disk")


@pytest.mark.parametrize("off", ["0", "false", "No", "OFF", " 0 "])
def test_environment_turns_a_feature_off(off, target, new_session, core, monkeypatch):
    monkeypatch.setenv("TRL_TURBO_DEMO", off)
    session = new_session(core.Plugin(core.make_patch(target.name), core.make_patch(target.name, "x.one", "x")))
    module = target.load()
    found = session.patch()
    assert found["demo.one"].status == "off"
    assert "TRL_TURBO_DEMO" in found["demo.one"].reason
    assert found["x.one"].status == "applied"
    assert session.patch(demo=True)["demo.one"].status == "applied", "the keyword wins"
    assert module.function() == "turbo(turbo(stock))"


@pytest.mark.parametrize("on", ["1", "true", "Yes", "on", ""])
def test_environment_leaves_a_feature_on(on, target, new_session, core, monkeypatch):
    monkeypatch.setenv("TRL_TURBO_DEMO", on)
    monkeypatch.setenv("TRL_TURBO", on)
    session = new_session(core.Plugin(core.make_patch(target.name)))
    assert session.patch()["demo.one"].status == "pending"
    assert session.patch(demo=False)["demo.one"].reason == "turned off by patch(demo=False)"
    assert session.patch(demo=None)["demo.one"].status == "pending"


def test_everything_off(target, new_session, core, monkeypatch):
    monkeypatch.setenv("TRL_TURBO", "0")
    module = target.load()
    session = new_session(core.Plugin(core.make_patch(target.name)), entry_points=lambda: 1 / 0)
    found = session.patch(demo=True, from_a_plugin=True)
    assert (found["demo.one"].status, found["demo.one"].reason) == (
        "off",
        "TRL_TURBO=0 in the environment turns everything off",
    )
    assert module.function() == "stock"
    assert "from_a_plugin" in found.notes[0].text, "a script with a plugin's keyword still runs"


@pytest.mark.parametrize("variable", ["TRL_TURBO", "TRL_TURBO_DEMO", "TRL_TURBO_PLUGINS"])
def test_bad_environment(variable, target, new_session, core, monkeypatch):
    monkeypatch.setenv(variable, "maybe")
    session = new_session(core.Plugin(core.make_patch(target.name)))
    with pytest.raises(
        ValueError, match=f"{variable}='maybe' in the environment is neither on nor off; set it to 1 or 0"
    ):
        session.patch()
    assert session.status().rows == ()


def test_misspelt_environment(target, new_session, core, monkeypatch):
    monkeypatch.setenv("TRL_TURBO_DEMOO", "0")
    monkeypatch.setenv("TRL_TURBO_CACHE_DIR", "/tmp")
    found = new_session(core.Plugin(core.make_patch(target.name))).patch()
    assert [note.text for note in found.notes] == [
        "TRL_TURBO_DEMOO in the environment switches nothing; did you mean TRL_TURBO_DEMO?"
    ]


def test_unknown_keyword(target, new_session, core):
    session = new_session(core.Plugin(core.make_patch(target.name)), features=("logprob",))
    with pytest.raises(
        TypeError, match=r"no feature 'logprb'; did you mean 'logprob'\? The features are: demo, logprob"
    ):
        session.patch(logprb=True)
    assert session.status().rows == ()
    assert session.patch(logprob=False)["demo.one"].status == "pending"
    with pytest.raises(TypeError, match="no feature 'other'; The features are"):
        session.patch(other=None)


@pytest.mark.parametrize("value", ["yes", 1, 0.0])
def test_keyword_that_is_no_bool(value, new_session):
    with pytest.raises(TypeError, match="is neither on nor off; pass True or False"):
        new_session(features=("demo",)).patch(demo=value)


def test_a_word_is_a_way_to_be_on(target, new_session, core, monkeypatch):
    seen = []

    class Plugin(core.Plugin):
        @hookimpl
        def turbo_patches(self, env):
            seen.append((env.features["rollout"], dict(env.words)))
            return super().turbo_patches(env)

    session = new_session(Plugin(core.make_patch(target.name, "rollout.one", "rollout")), features=("rollout",))
    assert session.patch(rollout="script")["rollout.one"].status == "pending"
    monkeypatch.setenv("TRL_TURBO_ROLLOUT", "script")
    session.patch(rollout=True)
    session.patch()
    monkeypatch.setenv("TRL_TURBO_ROLLOUT", "0")
    assert session.patch()["rollout.one"].status == "off"
    script = (True, {"rollout": "script"})
    assert seen == [script, (True, {}), script, (False, {})]
    with pytest.raises(TypeError, match="pass True or False, or 'script'"):
        session.patch(rollout="vllm")


@pytest.mark.parametrize("first", ["one", "two", "three"])
def test_a_feature_that_comes_later_is_wrapped_as_if_all_had_come_at_once(first, target, new_session, core):
    module = target.load()
    names = ("one", "two", "three")

    def build(name):
        def wrap(original):
            return lambda *args, **kwargs: f"{name}({original(*args, **kwargs)})"

        return lambda module: [Replacement(module, "function", wrap)]

    patches = [core.make_patch(target.name, f"{name}.all", name, build=build(name)) for name in names]
    session = new_session(core.Plugin(*patches), features=names)
    at_once = "three(two(one(stock)))"
    session.patch()
    assert module.function() == at_once
    session.unpatch()
    session.patch(**{name: name == first for name in names})
    assert module.function() == f"{first}(stock)"
    session.patch()
    assert module.function() == at_once
    session.patch(**{first: False})
    session.patch()
    assert module.function() == at_once
    session.unpatch()
    assert module.function() == "stock"


def test_what_is_not_measured_yet_is_off_unless_asked_for(target, new_session, core, monkeypatch):
    monkeypatch.setattr(_features, "OPT_IN", {"rollout": "off by default, and why"})
    session = new_session(core.Plugin(core.make_patch(target.name, "rollout.one", "rollout")), features=("rollout",))
    row = session.patch(strict=True)["rollout.one"]
    assert row.status == "off"
    assert row.reason == "off by default, and why"
    assert session.patch(rollout=True)["rollout.one"].status == "pending"
    monkeypatch.setenv("TRL_TURBO_ROLLOUT", "1")
    assert session.patch()["rollout.one"].status == "pending"
    assert session.patch(rollout=False)["rollout.one"].reason == "turned off by patch(rollout=False)"


def test_public_patch_names_its_features():
    before = trl_turbo.status().rows  # of the process, which other tests may have patched before
    with pytest.raises(TypeError, match="no feature 'logprop'; did you mean 'logprob'"):
        trl_turbo.patch(logprop=True)
    assert trl_turbo.status().rows == before


def test_unknown_keyword_is_noted_where_a_plugin_is_broken(target, new_session, core):
    session = new_session(core.Plugin(core.make_patch(target.name)), Raises())
    assert "no feature 'theirs'" in session.patch(theirs=True).notes[0].text


def test_a_builtin_that_cannot_be_imported(new_session):
    found = new_session(builtin=("trl_turbo.patches.no_such",), features=("gone",)).patch(gone=False)
    assert "ModuleNotFoundError" in found["plugin.no_such"].reason


def test_other_switches_the_second_time(target, new_session, core):
    def build(module):
        return core.replacements(module, core.KINDS[:-1])

    first = core.make_patch(target.name, build=build)
    second = core.make_patch(target.name, "more.one", "more", build=build)
    session = new_session(core.Plugin(first, second))
    module = target.load()
    before = core.snapshot(module)
    layers = {1: "turbo(stock)", 2: "turbo(turbo(stock))"}
    no_demo, no_more = {"demo": False}, {"more": False}
    for switches, depth in [({}, 2), (no_demo, 1), ({}, 2), (no_more, 1), (no_demo, 1), ({}, 2)]:
        found = session.patch(**switches)
        assert core.readings(module) == {**dict.fromkeys(core.KINDS, layers[depth]), "Value": "stock"}
        assert found["demo.one"].status == ("off" if switches.get("demo") is False else "applied")
        assert found["more.one"].status == ("off" if switches.get("more") is False else "applied")
    session.patch(demo=False, more=False)
    assert core.same(before, core.snapshot(module))
    assert not any(type(finder).__name__ == "ImportHook" for finder in sys.meta_path)
    session.unpatch()
    assert core.same(before, core.snapshot(module))


@pytest.mark.parametrize(
    "fields",
    [
        {"requires": ("trl>=9",)},
        {"probe": lambda module: "its signature moved"},
        {"build": lambda module: 1 / 0},
    ],
)
def test_strict_takes_everything_back(fields, target, new_session, core):
    session = new_session(
        core.Plugin(core.make_patch(target.name, "demo.good"), core.make_patch(target.name, **fields))
    )
    module = target.load()
    before = core.snapshot(module)
    with pytest.raises(PatchError, match=r"demo\.one (skipped|failed) \("):
        session.patch(strict=True)
    assert core.same(before, core.snapshot(module))
    assert not any(type(finder).__name__ == "ImportHook" for finder in sys.meta_path)
    assert session.patch()["demo.good"].status == "applied"
    with pytest.raises(PatchError):
        session.patch(strict=True)
    assert core.same(before, core.snapshot(module))


def test_strict_knows_no_error_in_what_is_off(target, new_session, core):
    session = new_session(core.Plugin(core.make_patch(target.name, requires=("trl>=9",))))
    assert session.patch(strict=True, demo=False)["demo.one"].status == "off"


def test_strict_raises_from_a_later_import(target, new_session, core):
    other = core.make_patch("json", "json.one", build=lambda m: [Replacement(m, "dumps", core.turbo)])
    fails = [True]

    def probe(module):
        return "its signature moved" if fails[0] else None

    session = new_session(
        core.Plugin(other, core.make_patch(target.name, "demo.good"), core.make_patch(target.name, probe=probe))
    )
    import json

    session.patch(strict=True)
    with pytest.raises(PatchError, match=r"demo\.one skipped \(its signature moved\)"):
        target.load()
    assert target.name not in sys.modules
    assert json.dumps(1) == "turbo(1)", "what belongs to other modules stays"
    assert session.status()["demo.good"].status == "pending"
    fails[0] = False
    assert core.readings(target.load())["method"] == "turbo(turbo(stock))"
    session.unpatch()
    assert json.dumps(1) == "1"


def test_blocked_row(target, new_session, core):
    session = new_session(core.Plugin(core.make_patch(target.name, build=lambda m: core.replacements(m, ("method",)))))
    module = target.load()
    original = module.Target.method
    session.patch()
    ours = module.Target.method
    module.Target.method = lambda self: f"foreign({ours(self)})"
    row = session.unpatch()["demo.one"]
    assert row.status == "blocked"
    assert "Target.method" in row.reason
    assert session.status()["demo.one"].status == "blocked"
    assert module.Target().method() == "foreign(stock)"
    assert session.patch()["demo.one"].status == "applied"
    assert module.Target().method() == "foreign(turbo(stock))"
    assert session.patch(demo=False)["demo.one"].status == "blocked"
    module.Target.method = ours
    assert session.unpatch()["demo.one"].status == "off"
    assert module.Target.method is original


def test_blocked_row_of_a_plugin_that_is_gone(target, new_session, core):
    plugin = core.Plugin(core.make_patch(target.name, build=lambda m: core.replacements(m, ("method",))))
    session = new_session(plugin)
    module = target.load()
    session.patch()
    ours = module.Target.method
    module.Target.method = lambda self: f"foreign({ours(self)})"
    session.unpatch()
    plugin.patches = []
    assert session.patch()["demo.one"].status == "blocked"
    assert module.Target().method() == "foreign(stock)"
