"""Every order of import, patch, unpatch, subclass and import anew, against a model of what must come out."""

from __future__ import annotations

import itertools
import sys

import pytest

OPERATIONS = ("import", "patch", "unpatch", "subclass", "forget")
LONGEST = 5


class Model:
    """What is expected: which modules are patched, and what the row says."""

    def __init__(self):
        self.active = self.ever = self.applied = False
        self.modules = []  # every module object there was, with its snapshot
        self.current = None
        self.patched = set()  # ids of the patched ones
        self.subclasses = []  # (module, class)

    def status(self):
        if not self.ever:
            return None
        if not self.active:
            return "off"
        return "applied" if self.applied else "pending"


def run(sequence, target, new_session, core):
    session = new_session(core.Plugin(core.make_patch(target.name)))
    model = Model()
    hooks = list(sys.meta_path)
    for step, operation in enumerate(sequence):
        if operation == "import":
            fresh = target.name not in sys.modules
            module = target.load()
            if fresh:
                model.modules.append(module)
                model.current = module
                if model.active:
                    model.patched.add(id(module))
                    model.applied = True
        elif operation == "patch":
            report = session.patch()
            model.active = model.ever = True
            if model.current is not None:
                model.patched.add(id(model.current))
                model.applied = True
            assert report == session.status()
        elif operation == "unpatch":
            session.unpatch()
            model.active = model.applied = False
            model.patched.clear()
        elif operation == "subclass" and model.current is not None:
            model.subclasses.append((model.current, type("Sub", (model.current.Target,), {})))
        elif operation == "forget":
            target.forget()
            model.current = None
        check(sequence[: step + 1], model, session, core)
    session.unpatch()
    assert sys.meta_path == hooks
    target.forget()
    return model


def check(done, model, session, core):
    for module in model.modules:
        word = "turbo(stock)" if id(module) in model.patched else "stock"
        seen = [core.readings(module)]
        seen += [core.readings(module, sub) for owner, sub in model.subclasses if owner is module]
        for reading in seen:
            assert reading == dict.fromkeys(core.KINDS, word), done
        if id(module) not in model.patched:
            assert "inherited" not in vars(module.Target), done
    rows = session.status().rows
    assert [row.status for row in rows] == ([] if model.status() is None else [model.status()]), done
    assert any(type(finder).__name__ == "ImportHook" for finder in sys.meta_path) is model.active, done


@pytest.mark.parametrize("start", list(itertools.product(OPERATIONS, repeat=2)), ids="-".join)
def test_every_order(start, target, new_session, core):
    for length in range(LONGEST - 1):
        for rest in itertools.product(OPERATIONS, repeat=length):
            run((*start, *rest), target, new_session, core)


@pytest.mark.parametrize("first", ["import", "patch"])
def test_everything_is_as_before(first, target, new_session, core):
    session = new_session(core.Plugin(core.make_patch(target.name)))
    if first == "import":
        before = core.snapshot(target.load())
        session.patch()
    else:
        session.patch()
        module = target.load()
        session.unpatch()
        before = core.snapshot(module)
        session.patch()
    module = target.load()
    assert not core.same(before, core.snapshot(module))
    session.unpatch()
    assert core.same(before, core.snapshot(module))
    session.patch()
    session.patch()
    session.unpatch()
    session.unpatch()
    assert core.same(before, core.snapshot(module))
    assert core.readings(module) == dict.fromkeys(core.KINDS, "stock")
