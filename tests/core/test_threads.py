"""Many threads patch, unpatch and import at once; it ends consistent, and it ends."""

from __future__ import annotations

import itertools
import sys
import threading

import pytest

THREADS = 8


def together(*functions):
    """Run functions in threads that start at one moment; raise what one raised, and fail where one hangs."""
    barrier, errors = threading.Barrier(len(functions)), []

    def run(function):
        barrier.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    if errors:
        raise errors[0]


@pytest.fixture(autouse=True)
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def session(target, new_session, core):
    patches = [core.make_patch(target.name, f"demo.{index}") for index in range(3)]
    return new_session(core.Plugin(*patches))


THREE = "turbo(turbo(turbo(stock)))"


@pytest.mark.parametrize("loaded", [True, False])
def test_all_patch(loaded, session, target, core):
    for _ in range(5):
        if loaded:
            target.load()

        def patch():
            assert {row.status.value for row in session.patch()} == {"applied" if loaded else "pending"}

        together(*[patch] * THREADS)
        module = target.load()
        before = core.readings(module)
        assert before == dict.fromkeys(core.KINDS, THREE)
        session.unpatch()
        assert core.readings(module) == dict.fromkeys(core.KINDS, "stock")
        target.forget()


def test_patch_and_unpatch(session, target, core):
    module = target.load()
    before = core.snapshot(module)

    def back_and_forth():
        for _ in range(10):
            session.patch()
            session.unpatch()

    together(*[back_and_forth] * THREADS)
    assert core.same(before, core.snapshot(module))
    session.patch()
    assert core.readings(module) == dict.fromkeys(core.KINDS, THREE)
    session.unpatch()
    assert core.same(before, core.snapshot(module))


def test_imports_go_on_meanwhile(session, target, core):
    stop = threading.Event()

    def back_and_forth():
        for _ in range(15):
            session.patch()
            session.unpatch()
        session.patch()

    def importing():
        while not stop.is_set():
            target.load()
            target.forget()

    def patching():
        try:
            together(*[back_and_forth] * 4)
        finally:
            stop.set()

    together(patching, importing)
    assert core.readings(target.load()) == dict.fromkeys(core.KINDS, THREE)
    session.unpatch()
    assert core.readings(target.load()) == dict.fromkeys(core.KINDS, "stock")


def test_switches_change_meanwhile(new_session, target, core):
    names = core.KINDS[:-1]
    patches = [
        core.make_patch(target.name, f"{name}.one", name, build=lambda m, name=name: core.replacements(m, (name,)))
        for name in map(str.lower, names)
    ]
    session = new_session(core.Plugin(*patches))
    module = target.load()
    before = core.snapshot(module)
    combinations = [dict(zip(names, bits, strict=True)) for bits in itertools.product([True, False], repeat=len(names))]

    def switch(part):
        for switches in combinations[part::THREADS]:
            session.patch(**switches)

    together(*[lambda part=part: switch(part) for part in range(THREADS)])
    found = session.patch(method=False, static=False)
    off = {"method", "static", "Value"}
    assert core.readings(module) == {k: "stock" if k in off else "turbo(stock)" for k in core.KINDS}
    assert {row.feature for row in found.by_status("off")} == {"method", "static"}
    session.unpatch()
    assert core.same(before, core.snapshot(module))


def test_build_that_imports_what_another_thread_is_importing(target, new_session, core):
    """The end of that import applies a patch: holding our lock while building would be a deadlock."""
    inside, building = threading.Event(), threading.Event()
    hook = f"{target.package}_hook"
    sys.modules[hook] = type(sys)(hook)

    def body():
        inside.set()
        assert building.wait(20)

    sys.modules[hook].call = body
    target.rewrite(f"import {hook}\n{hook}.call()\n{target.source}")

    def build(module):
        building.set()
        target.load()
        return []

    # A loaded module, so that patch() builds at once, while the target is imported by the other thread.
    session = new_session(core.Plugin(core.make_patch(target.name), core.make_patch("json", "demo.json", build=build)))

    def patching():
        assert inside.wait(20)
        session.patch()

    try:
        together(target.load, patching)
    finally:
        del sys.modules[hook]
    assert {row.name: row.status.value for row in session.status()} == {"demo.one": "applied", "demo.json": "applied"}
    assert core.readings(target.load()) == dict.fromkeys(core.KINDS, "turbo(stock)")
