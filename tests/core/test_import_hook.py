"""The post-import hook: lazy packages, reloads, modules that are still running, and other finders."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import textwrap
import threading

import pytest


@pytest.fixture
def session(target, new_session, core):
    return new_session(core.Plugin(core.make_patch(target.name)))


def test_loader_is_the_modules_own_again(session, target):
    plain = type(importlib.util.find_spec("json").loader)
    session.patch()
    module = target.load()
    assert type(module.__loader__) is type(module.__spec__.loader) is plain
    assert inspect.getsource(module.Base).startswith("class Base")


def test_asking_for_a_spec_imports_nothing(session, target):
    session.patch()
    spec = importlib.util.find_spec(target.name)
    assert spec.origin == str(target.path)
    assert spec.loader.get_source(target.name) == target.source
    assert target.name not in sys.modules


def test_reload(session, target, core):
    module = target.load()
    session.patch()
    old = module.Target
    target.rewrite(target.source.replace("stock", "fresh"))
    assert importlib.reload(module) is module
    assert core.readings(module) == dict.fromkeys(core.KINDS, "turbo(fresh)")
    assert old().method() == "turbo(stock)", "instances made before still have their class"
    found = session.unpatch()
    assert found["demo.one"].status == "off"
    assert core.readings(module) == dict.fromkeys(core.KINDS, "fresh")
    assert (old().method(), "inherited" in vars(old)) == ("stock", False)
    importlib.reload(module)
    assert core.readings(module) == dict.fromkeys(core.KINDS, "fresh")


def test_import_anew(session, target, core):
    session.patch()
    first = target.load()
    target.forget()
    second = target.load()
    assert first is not second
    for module in (first, second):
        assert core.readings(module) == dict.fromkeys(core.KINDS, "turbo(stock)")
    session.unpatch()
    for module in (first, second):
        assert core.readings(module) == dict.fromkeys(core.KINDS, "stock")


LAZY = """
import importlib, sys
from types import ModuleType

class Lazy(ModuleType):
    def __init__(self, name, path, spec):
        super().__init__(name)
        self.__path__, self.__spec__ = path, spec

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module("." + "trainer", self.__name__), name)

sys.modules[__name__] = Lazy(__name__, __path__, __spec__)
"""


@pytest.mark.parametrize("first", ["patch", "import"])
def test_lazy_package(first, session, target, core):
    (target.path.parent / "__init__.py").write_text(LAZY)
    importlib.invalidate_caches()
    if first == "patch":
        session.patch()
    package = importlib.import_module(target.package)
    assert target.name not in sys.modules
    cls = package.Target
    session.patch()
    assert cls().method() == "turbo(stock)"
    session.unpatch()
    assert cls().method() == "stock"


@pytest.mark.parametrize("first", ["patch", "import"])
def test_the_lazy_package_itself_is_the_target(first, new_session, target, core):
    """It is another object than the one whose body ran."""
    (target.path.parent / "__init__.py").write_text(LAZY)
    importlib.invalidate_caches()
    seen = []
    patch = core.make_patch(target.package, build=lambda module: seen.append(module) or [])
    session = new_session(core.Plugin(patch))
    if first == "patch":
        session.patch()
    package = importlib.import_module(target.package)
    session.patch()
    assert seen == [package]
    assert type(package).__name__ == "Lazy"


def run_while_importing(target, tmp_name, body):
    """Make the target's body call ``body`` in its middle."""
    hook = f"{target.package}_hook"
    sys.modules[hook] = type(sys)(hook)
    sys.modules[hook].call = body
    head, middle, tail = target.source.partition("class Value:")
    target.rewrite(f"{head}\nimport {hook}\n{hook}.call()\n{middle}{tail}")
    return hook


def test_patch_called_from_inside_the_import(session, target, core):
    reports = []
    hook = run_while_importing(target, "hook", lambda: reports.append(session.patch()))
    try:
        module = target.load()
    finally:
        del sys.modules[hook]
    assert reports[0]["demo.one"].status == "pending", "half a module is not patched"
    assert core.readings(module) == dict.fromkeys(core.KINDS, "turbo(stock)")
    assert session.status()["demo.one"].status == "applied"
    assert type(module.__spec__) is type(sys.__spec__)
    assert importlib.reload  # the spec is the plain one again
    session.unpatch()
    assert core.readings(module) == dict.fromkeys(core.KINDS, "stock")


def test_patch_and_unpatch_from_inside_the_import(session, target, core):
    hook = run_while_importing(target, "hook", lambda: (session.patch(), session.unpatch()))
    try:
        module = target.load()
    finally:
        del sys.modules[hook]
    assert core.readings(module) == dict.fromkeys(core.KINDS, "stock")


def test_import_that_fails_after_patch_was_called_inside(session, target, core):
    def body():
        session.patch()
        raise RuntimeError("their bug")

    hook = run_while_importing(target, "hook", body)
    try:
        with pytest.raises(RuntimeError, match="their bug"):
            target.load()
    finally:
        del sys.modules[hook]
    assert session.status()["demo.one"].status == "pending"
    target.rewrite(target.source)
    assert target.load().function() == "turbo(stock)"


def test_patch_while_another_thread_imports(session, target, core):
    inside, go_on = threading.Event(), threading.Event()

    def body():
        inside.set()
        assert go_on.wait(20)

    hook = run_while_importing(target, "hook", body)
    importer = threading.Thread(target=target.load)
    importer.start()
    try:
        assert inside.wait(20)
        assert session.patch()["demo.one"].status == "pending", "patch() does not wait for the import"
        go_on.set()
        importer.join(20)
        assert not importer.is_alive()
    finally:
        go_on.set()
        del sys.modules[hook]
    assert core.readings(target.load()) == dict.fromkeys(core.KINDS, "turbo(stock)")
    assert session.status()["demo.one"].status == "applied"


def test_failing_import_stays_the_users(session, target):
    target.rewrite("raise KeyError('their bug')")
    session.patch()
    with pytest.raises(KeyError, match="their bug"):
        target.load()
    assert session.status()["demo.one"].status == "pending"
    target.rewrite(target.source)
    assert target.load().function() == "turbo(stock)"


def test_our_failure_does_not_break_the_import(new_session, target, core, monkeypatch, caplog):
    session = new_session(core.Plugin(core.make_patch(target.name)))
    session.patch()
    monkeypatch.setattr(session.session, "_announce", lambda *args, **kwargs: 1 / 0)
    assert target.load().function() == "turbo(stock)"
    assert "could not finish patching" in caplog.text
    monkeypatch.undo()


def test_missing_module_is_still_missing(new_session, core):
    session = new_session(core.Plugin(core.make_patch("no_such_module_at_all")))
    session.patch()
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        importlib.import_module("no_such_module_at_all")
    assert importlib.util.find_spec("no_such_module_at_all") is None


def test_beside_a_finder_that_asks_all_finders(session, target, core, monkeypatch):
    """Instrumentation such as wrapt's import hook does."""

    class Asking:
        def __init__(self):
            self.busy = set()

        def find_spec(self, name, path=None, target=None):
            if name in self.busy:
                return None
            self.busy.add(name)
            try:
                return importlib.util.find_spec(name)
            finally:
                self.busy.discard(name)

    asking = Asking()
    monkeypatch.setattr(sys, "meta_path", [asking, *sys.meta_path])
    session.patch()
    sys.meta_path.sort(key=lambda finder: finder is not asking)
    assert core.readings(target.load()) == dict.fromkeys(core.KINDS, "turbo(stock)")
    target.forget()
    sys.meta_path.sort(key=lambda finder: finder is asking)
    assert core.readings(target.load()) == dict.fromkeys(core.KINDS, "turbo(stock)")
    session.unpatch()


def test_module_that_was_imported_behind_our_back(session, target, core):
    """A finder in front of ours served it: the next call finds it."""
    session.patch()
    finders = sys.meta_path[:]
    sys.meta_path[:] = [finder for finder in finders if type(finder).__name__ != "ImportHook"]
    try:
        module = target.load()
    finally:
        sys.meta_path[:] = finders
    assert module.function() == "stock"
    assert session.status()["demo.one"].status == "applied"
    assert module.function() == "turbo(stock)"


def test_hook_is_installed_once_and_only_where_needed(session, new_session, target):
    def count():
        return sum(type(finder).__name__ == "ImportHook" for finder in sys.meta_path)

    before = count()
    new_session().patch()
    assert count() == before, "nothing to wait for"
    session.patch()
    session.patch()
    assert count() == before + 1
    session.unpatch()
    assert count() == before


def test_spec_made_before_unpatch_runs_after_it(session, target, core):
    session.patch()
    spec = importlib.util.find_spec(target.name)
    session.unpatch()
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert core.readings(module) == dict.fromkeys(core.KINDS, "stock")


def test_import_star_and_from_import(session, target, core):
    session.patch()
    namespace = {}
    exec(textwrap.dedent(f"from {target.name} import *\nfrom {target.name} import function as f"), namespace)
    assert namespace["Target"]().method() == namespace["f"]() == "turbo(stock)"
