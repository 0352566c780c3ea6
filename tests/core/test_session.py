"""patch, unpatch, status: decisions, switches, strict, what is told to whom."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

import trl_turbo
from trl_turbo import kernels, patching, report
from trl_turbo.hookspecs import hookimpl
from trl_turbo.patching import Replacement


def test_patch_trl_is_patch():
    assert trl_turbo.patch_trl is trl_turbo.patch


def test_unpatch_and_status_before_patch(new_session):
    session = new_session()
    assert session.unpatch().rows == session.status().rows == ()
    assert "call trl_turbo.patch()" in str(session.status())


def test_row_of_an_applied_patch(target, new_session, core):
    target.load()
    row = new_session(core.Plugin(core.make_patch(target.name))).patch()["demo.one"]
    assert (row.status, row.feature, row.target, row.source) == ("applied", "demo", target.name, "plugin0")
    assert row.summary == f"patches {target.name}"
    assert "Target.method" in row.reason
    assert f"{target.name}.function" in row.reason


def test_pending_says_when(target, new_session, core):
    row = new_session(core.Plugin(core.make_patch(target.name))).patch()["demo.one"]
    assert (row.status, row.reason) == ("pending", f"applies when {target.name} is imported")


def test_second_patch_asks_no_plugin(target, new_session, core):
    calls = Counter()

    def build(module):
        calls["build"] += 1
        return core.replacements(module)

    plugin = core.Plugin(core.make_patch(target.name, build=build))
    session = new_session(plugin)
    target.load()
    first = session.patch()
    plugin.patches = []
    assert session.patch() == first
    assert calls["build"] == 1


def test_failed_build_is_rolled_back_alone(target, new_session, core):
    def build(module):
        yield from core.replacements(module, ("method",))
        raise RuntimeError("no such thing")

    def wrap(raw):
        raise KeyError("gone")

    def late(module):
        return [*core.replacements(module, ("static",)), Replacement(module.Target, "klass", wrap)]

    session = new_session(
        core.Plugin(
            core.make_patch(target.name, "demo.bad", build=build),
            core.make_patch(target.name, "demo.late", build=late),
            core.make_patch(target.name, "demo.good", build=lambda m: core.replacements(m, ("function",))),
        )
    )
    module = target.load()
    found = session.patch()
    assert (found["demo.bad"].status, found["demo.bad"].reason) == ("failed", "RuntimeError: no such thing")
    assert (found["demo.late"].status, found["demo.late"].reason) == ("failed", "KeyError: 'gone'")
    assert found["demo.good"].status == "applied"
    expected = {**dict.fromkeys(core.KINDS, "stock"), "function": "turbo(stock)"}
    assert core.readings(module) == expected


def test_probe_decides(target, new_session, core):
    def broken(module):
        raise ZeroDivisionError("oh")

    session = new_session(
        core.Plugin(
            core.make_patch(target.name, "demo.moved", probe=lambda m: f"{m.__name__} lost its second argument"),
            core.make_patch(target.name, "demo.broken", probe=broken),
        )
    )
    module = target.load()
    found = session.patch()
    assert (found["demo.moved"].status, found["demo.moved"].reason) == (
        "skipped",
        f"{target.name} lost its second argument",
    )
    assert (found["demo.broken"].status, found["demo.broken"].reason) == ("failed", "ZeroDivisionError: oh")
    assert core.readings(module) == dict.fromkeys(core.KINDS, "stock")


@pytest.mark.parametrize(
    ("requires", "status", "reason"),
    [
        (("trl>=1,<2",), "pending", None),
        (("trl>=2",), "skipped", "it needs trl>=2, and trl 1.2.3 is installed"),
        (("trl>=1", "no-such-thing>=3"), "skipped", "it needs no-such-thing>=3, and no-such-thing is not installed"),
        (("trl>=2; python_version < '3'",), "pending", None),
        (("trl >>= 2",), "failed", "is not a PEP 508 requirement"),
        (("pytest>=1",), "pending", None),
    ],
)
def test_requirements(requires, status, reason, target, new_session, core):
    row = new_session(core.Plugin(core.make_patch(target.name, requires=requires))).patch()["demo.one"]
    assert row.status == status
    assert reason is None or reason in row.reason


@pytest.mark.parametrize(
    ("version", "reason"),
    [("1.17.0.dev0", None), ("1.18.0.dev0", "trl 1.18.0.dev0 is installed"), ("N/A", "calls itself 'N/A'")],
)
def test_odd_versions(version, reason, target, new_session, core, monkeypatch):
    monkeypatch.setattr("trl_turbo.compat.versions.reported", lambda: {"trl": version})
    row = new_session(core.Plugin(core.make_patch(target.name, requires=("trl>=1.16,<1.18.0.dev0",)))).patch()[
        "demo.one"
    ]
    assert row.status == ("pending" if reason is None else "skipped")
    assert reason is None or reason in row.reason


class Vetoer:
    @hookimpl
    def turbo_veto(self, patch, env):
        assert env.features["demo"] is True
        assert env.versions["trl"] == "1.2.3"
        return "this cluster forbids it" if patch.name == "demo.one" else None


def test_veto(target, new_session, core):
    patches = [core.make_patch(target.name), core.make_patch(target.name, "demo.two")]
    found = new_session(core.Plugin(*patches), Vetoer()).patch()
    assert (found["demo.one"].status, found["demo.one"].reason) == ("skipped", "this cluster forbids it")
    assert found["demo.two"].status == "pending"


def test_a_hook_that_raises_stops_no_other(target, new_session, core):
    class Broken:
        @hookimpl(tryfirst=True)
        def turbo_veto(self, patch, env):
            raise RuntimeError("boom")

        @hookimpl(tryfirst=True)
        def turbo_report(self, report):
            raise RuntimeError("bang")

    found = new_session(core.Plugin(core.make_patch(target.name)), Vetoer(), Broken()).patch()
    assert found["demo.one"].reason == "this cluster forbids it"
    assert found["plugin.plugin2"].status == "failed"
    assert "its turbo_veto raised RuntimeError: boom" in found["plugin.plugin2"].reason


class WrongArguments:
    @hookimpl
    def turbo_veto(self, patch, environment):
        return "never"


class WrongName:
    @hookimpl
    def turbo_patch(self, env):
        return []


class WrongAnswer:
    @hookimpl
    def turbo_patches(self, env):
        return ["demo"]


class Raises:
    @hookimpl
    def turbo_patches(self, env):
        raise OSError("disk")


class Reserved:
    def __init__(self, make_patch):
        self.make_patch = make_patch

    @hookimpl
    def turbo_patches(self, env):
        return [self.make_patch("x", "s.one", "strict"), self.make_patch("x", "s.two", "Upper")]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda core: WrongArguments(), "environment"),
        (lambda core: WrongName(), "'turbo_patch' is not a hook; the hooks are turbo_engine"),
        (lambda core: WrongAnswer(), "returned 'demo'"),
        (lambda core: Raises(), "its turbo_patches raised OSError: disk"),
        (lambda core: Reserved(core.make_patch), "'strict'"),
        (lambda core: core.Plugin(core.make_patch("x")), "a second patch 'demo.one'; plugin0 brings it already"),
    ],
)
def test_a_broken_plugin_is_a_row(make, reason, target, new_session, core):
    found = new_session(core.Plugin(core.make_patch(target.name)), make(core)).patch()
    assert found["demo.one"].status == "pending"
    assert found["plugin.plugin1"].status == "failed"
    assert reason in found["plugin.plugin1"].reason


def test_entry_points(target, new_session, core, monkeypatch):
    def broken():
        raise ImportError("no module named left_pad")

    points = [
        ("good", "good:plugin", lambda: core.Plugin(core.make_patch(target.name))),
        ("bad", "bad:plugin", broken),
        ("more", "more:plugin", lambda: core.Plugin(core.make_patch(target.name, "more.one", "more"))),
    ]
    session = new_session(entry_points=lambda: points)
    found = session.patch()
    assert [(row.name, row.status.value) for row in found] == [
        ("demo.one", "pending"),
        ("more.one", "pending"),
        ("plugin.bad", "failed"),
    ]
    assert found["plugin.bad"].reason == "it could not be loaded (ImportError: no module named left_pad)"
    session.unpatch()
    monkeypatch.setenv("TRL_TURBO_PLUGINS", "0")
    assert session.patch().rows == ()


def test_unreadable_entry_points(new_session):
    def unreadable():
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")

    assert new_session(entry_points=unreadable).patch()["plugin.entry_points"].status == "failed"


# -- what is told ------------------------------------------------------------------------------------------------------


def test_log_lines(target, new_session, core, caplog):
    caplog.set_level(logging.INFO, "trl_turbo")
    skipped = core.make_patch(target.name, "demo.old", requires=("trl<1",))
    session = new_session(core.Plugin(core.make_patch(target.name), skipped))
    session.patch()
    session.patch()
    version = trl_turbo.__version__
    reason = "1 skipped (demo.old: it needs trl<1, and trl 1.2.3 is installed)"
    line = ("trl_turbo", logging.INFO, f"trl_turbo {version}: 1 pending, {reason}")
    assert caplog.record_tuples == [line], "nobody may ever use that module"
    caplog.clear()
    target.load()
    assert caplog.record_tuples == [("trl_turbo", logging.WARNING, f"trl_turbo {version}: 1 applied, {reason}")]
    caplog.clear()
    session.unpatch()
    assert caplog.messages == [f"trl_turbo {version}: 2 off"]
    caplog.clear()
    session.patch(verbose=False)
    target.forget()
    target.load()
    assert caplog.messages == []
    session.unpatch()
    caplog.clear()
    session.patch(verbose=True)
    assert caplog.messages[1:] == str(session.status()).splitlines(), "a record a line"


def test_turbo_report_is_told_of_each_change(target, new_session, core):
    told = []

    class Listener:
        @hookimpl
        def turbo_report(self, report):
            told.append([row.status.value for row in report])

    session = new_session(core.Plugin(core.make_patch(target.name)), Listener())
    session.patch()
    session.patch()
    target.load()
    session.unpatch()
    session.unpatch()
    assert told == [["pending"], ["applied"], ["off"]]


def test_kernels_of_a_plugin(target, new_session, core):
    asked = []

    class Kernels:
        @hookimpl
        def turbo_kernel(self, op, device, dtype):
            asked.append((op, device, dtype))
            return len if (op, device, dtype) == ("linear_logprob", "cuda", "bfloat16") else None

    session = new_session(core.Plugin(core.make_patch(target.name)), Kernels())
    session.patch()
    assert len(asked) == len(kernels.OPS) * 2 * 3
    assert kernels.get_override("linear_logprob", "cuda", "bfloat16") is len
    assert kernels.get_override("linear_logprob", "cpu", "bfloat16") is None
    session.patch()
    assert len(asked) == len(kernels.OPS) * 2 * 3
    session.unpatch()
    assert kernels.get_override("linear_logprob", "cuda", "bfloat16") is None
    session.patch(demo=False)
    assert kernels.get_override("linear_logprob", "cuda", "bfloat16") is None


def test_engine_of_a_plugin(new_session):
    class Engines:
        @hookimpl
        def turbo_engine(self, config):
            return f"engine for {config}" if config == "mine" else None

    session = new_session(Engines())
    assert session.session.engine("mine") is None
    session.patch()
    assert session.session.engine("mine") == "engine for mine"
    assert session.session.engine("other") is None


def test_notes_go_to_the_running_session(target, new_session, core, caplog):
    report.note("demo", "lost")
    session = new_session(core.Plugin(core.make_patch(target.name)))
    found = session.patch()
    for _ in range(3):
        report.note("demo", "the head is adapted")
    assert [note.text for note in found.notes] == ["the head is adapted"]
    assert session.status().notes == found.notes
    assert caplog.messages.count("demo: the head is adapted") == 1
    session.unpatch()
    report.note("demo", "lost as well")
    assert session.patch().notes == ()


def test_extend_at_run_time(target, new_session, core):
    class Model:
        def forward(self):
            return "stock"

    forward, built = Model.forward, []

    def wrap(raw):
        built.append(raw)
        return core.turbo(raw)

    replacement = Replacement(Model, "forward", wrap)
    session = new_session(core.Plugin(core.make_patch(target.name)))
    patching.extend("demo.one", replacement)
    assert Model.forward is forward
    session.patch()
    for _ in range(3):
        patching.extend("demo.one", replacement)
    patching.extend("no.such", replacement)
    assert Model().forward() == "turbo(stock)"
    assert len(built) == 1
    session.patch(demo=False)
    assert Model.forward is forward
    patching.extend("demo.one", replacement)
    assert Model.forward is forward
    session.patch()
    patching.extend("demo.one", replacement)
    session.unpatch()
    assert Model.forward is forward
    patching.extend("demo.one", replacement)
    assert Model.forward is forward
