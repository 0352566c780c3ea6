"""The ledger: kinds of attributes, units, foreign wrappers, stacked patches, instances."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import pickle
import typing
import weakref

import pytest

from trl_turbo.patching import Ledger, Patch, Replacement, as_written, replacement_of


def patch_of(*replacements, name="p"):
    return Patch(name=name, feature="demo", module="m", summary="s", build=lambda module: replacements)


@pytest.fixture
def module(target):
    return target.load()


def test_wrappers_keep_kind_signature_and_names(module, core):
    originals = {kind: inspect.getattr_static(module.Target, kind) for kind in ("method", "static", "klass", "prop")}
    signatures = {kind: inspect.signature(getattr(module.Target, kind)) for kind in ("method", "static", "klass")}
    hints = typing.get_type_hints(module.Target.method)
    Ledger().apply(patch_of(*core.replacements(module)), module)
    for kind, original in originals.items():
        assert type(inspect.getattr_static(module.Target, kind)) is type(original)
    for kind, signature in signatures.items():
        assert inspect.signature(getattr(module.Target, kind)) == signature
    assert inspect.signature(module.Target().method) == inspect.signature(originals["method"].__get__(module.Target()))
    method = module.Target.method
    assert (method.__name__, method.__qualname__, method.__module__) == ("method", "Target.method", module.__name__)
    assert method.__doc__ == "A method."
    assert module.Target.prop.__doc__ == "A property."
    assert typing.get_type_hints(method) == hints
    assert pickle.loads(pickle.dumps(module.function)) is module.function


def test_no_wrapped_attribute(module, core):
    """Accelerate follows ``__wrapped__`` down from an instance's forward and would drop a class-level one of ours."""

    @functools.wraps(module.Target.method)
    def decorated(self, x=1, *, key=None):
        return "stock"

    module.Target.method = decorated
    Ledger().apply(patch_of(*core.replacements(module, ("method",))), module)
    assert not hasattr(module.Target.method, "__wrapped__")
    assert module.Target().method() == "turbo(stock)"


def test_inherited_is_deleted_on_restore(module, core):
    ledger = Ledger()
    ledger.apply(patch_of(*core.replacements(module, ("inherited",))), module)
    assert "inherited" in vars(module.Target)
    assert module.Base().inherited() == "stock"
    ledger.restore()
    assert "inherited" not in vars(module.Target)


def test_coroutine_functions_stay_so():
    class Owner:
        async def work(self):
            return "stock"

    def wrap(raw):
        async def work(self):
            return f"turbo({await raw(self)})"

        return work

    Ledger().apply(patch_of(Replacement(Owner, "work", wrap)), None)
    assert inspect.iscoroutinefunction(Owner.work)
    assert asyncio.run(Owner().work()) == "turbo(stock)"


def test_property_parts_can_be_added_and_go_again():
    class Owner:
        @property
        def part(self):
            return "stock"

    def wrap(raw):
        return property(raw.fget, lambda self, value: self.__dict__.update(seen=value))

    ledger = Ledger()
    ledger.apply(patch_of(Replacement(Owner, "part", wrap)), None)
    owner, ours = Owner(), vars(Owner)["part"]
    owner.part = 3
    assert (owner.part, owner.seen) == ("stock", 3)
    ledger.restore()
    with pytest.raises(AttributeError):
        owner.part = 4
    with pytest.raises(AttributeError, match="cannot be set"):
        ours.fset(owner, 4)


@pytest.mark.parametrize(
    ("attr", "new", "sentence"),
    [
        ("prop", lambda self: 1, "a property was replaced"),
        ("method", 3, "which cannot be called"),
        ("method", staticmethod(len), "a plain function was replaced by a staticmethod"),
        ("static", classmethod(len), "a staticmethod was replaced by a classmethod"),
    ],
)
def test_wrong_kind_of_replacement(module, core, attr, new, sentence):
    before = core.snapshot(module)
    with pytest.raises(TypeError, match=sentence):
        Ledger().apply(
            patch_of(*core.replacements(module, ("function",)), Replacement(module.Target, attr, lambda raw: new)),
            module,
        )
    assert core.same(before, core.snapshot(module))


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda m: ["function"], TypeError, "build it from Replacement objects"),
        (lambda m: [Replacement(3, "x", len)], TypeError, "name the class or the module"),
        (lambda m: [Replacement(m, "gone", len)], AttributeError, r"\.gone does not exist"),
        (lambda m: [Replacement(m.Target, "gone", len)], AttributeError, r"Target\.gone does not exist"),
        (lambda m: [Replacement(m, "function", lambda f: f)] * 2, ValueError, "twice"),
        (lambda m: [Replacement(int, "bit_length", lambda f: f)], TypeError, "immutable"),
    ],
)
def test_bad_builds_leave_nothing(module, core, make, error, sentence):
    ledger, before = Ledger(), core.snapshot(module)
    with pytest.raises(error, match=sentence):
        ledger.apply(patch_of(*core.replacements(module, ("method",)), *make(module)), module)
    assert core.same(before, core.snapshot(module))
    ledger.apply(patch_of(*core.replacements(module, ("method",))), module)
    assert module.Target().method() == "turbo(stock)"


def test_not_wanted_any_more(module, core):
    before = core.snapshot(module)
    assert Ledger().apply(patch_of(*core.replacements(module)), module, wanted=lambda: False) is None
    assert core.same(before, core.snapshot(module))


def test_changed_while_built(module, core):
    """What another thread installs between wrapping and installing is wrapped, not lost."""
    calls = []

    def wrap(raw):
        if not calls:
            module.function = lambda x=1: "foreign"
        calls.append(raw)
        return core.turbo(raw)

    ledger = Ledger()
    ledger.apply(patch_of(Replacement(module, "function", wrap)), module)
    assert module.function() == "turbo(foreign)"
    assert len(calls) == 2


def foreign_by_closure(owner, attr):
    inner = getattr(owner, attr)
    return lambda *args: f"foreign({inner(*args)})"


def foreign_by_wraps(owner, attr):
    return functools.wraps(getattr(owner, attr))(foreign_by_closure(owner, attr))


def foreign_by_default(owner, attr):
    here = getattr(owner, attr)
    return lambda *args, inner=here: f"foreign({inner(*args)})"


def foreign_by_owner(owner, attr):
    owner._kept = vars(owner)[attr]
    return lambda self: f"foreign({self._kept()})"


WAYS = [foreign_by_closure, foreign_by_wraps, foreign_by_default, foreign_by_owner]


@pytest.mark.parametrize("way", WAYS)
def test_foreign_wrapper_is_left_and_ours_passes_through(module, core, way):
    ledger, patch = Ledger(), patch_of(*core.replacements(module, ("method",)))
    original = module.Target.method
    ledger.apply(patch, module)
    ours = module.Target.method
    module.Target.method = foreign = way(module.Target, "method")
    assert module.Target().method() == "foreign(turbo(stock))"

    ledger.restore()
    assert vars(module.Target)["method"] is foreign
    assert module.Target().method() == "foreign(stock)"
    assert ledger.blocked() == {"p": ("Target.method",)}

    ledger.apply(patch, module)
    assert vars(module.Target)["method"] is foreign, "turned on again, not wrapped twice"
    assert module.Target().method() == "foreign(turbo(stock))"
    assert ledger.blocked() == {}

    module.Target.method = ours
    ledger.restore()
    assert vars(module.Target)["method"] is original
    assert ledger.blocked() == {}


def test_foreign_value_that_does_not_call_ours(module, core):
    """Turning ours on again would be silently stock: it is wrapped afresh."""
    ledger, patch = Ledger(), patch_of(*core.replacements(module, ("method",)))
    ledger.apply(patch, module)
    ours = module.Target.method
    module.Target.method = foreign = lambda self: "foreign"
    ledger.restore()
    ledger.apply(patch, module)
    assert module.Target().method() == "turbo(foreign)"
    ledger.restore()
    assert vars(module.Target)["method"] is foreign
    assert ledger.blocked() == {"p": ("Target.method",)}
    assert ours(module.Target()) == "stock"


@pytest.mark.parametrize("kind", ["static", "klass", "function"])
def test_foreign_over_other_kinds(module, core, kind):
    ledger, patch = Ledger(), patch_of(*core.replacements(module, (kind,)))
    ledger.apply(patch, module)
    owner = module if kind == "function" else module.Target
    foreign = foreign_by_closure(owner, kind)
    setattr(owner, kind, foreign if kind == "function" else staticmethod(foreign))
    ledger.restore()
    assert core.readings(module)[kind] == "foreign(stock)"
    ledger.apply(patch, module)
    assert core.readings(module)[kind] == "foreign(turbo(stock))"


def test_foreign_over_property(module, core):
    ledger, patch = Ledger(), patch_of(*core.replacements(module, ("prop",)))
    ledger.apply(patch, module)
    inner = module.Target.prop
    module.Target.prop = property(lambda self: f"foreign({inner.fget(self)})")
    ledger.restore()
    assert module.Target().prop == "foreign(stock)"
    ledger.apply(patch, module)
    assert module.Target().prop == "foreign(turbo(stock))"


def test_foreign_over_a_value(module, core):
    ledger, patch = Ledger(), patch_of(*core.replacements(module, ("Value",)))
    original = module.Value
    ledger.apply(patch, module)
    ours = module.Value
    module.Value = foreign = type("Value", (ours,), {"name": "foreign"})
    ledger.restore()
    assert module.Value is foreign
    assert ledger.blocked() == {"p": (f"{module.__name__}.Value",)}
    module.Value = ours
    ledger.restore()
    assert module.Value is original
    assert ledger.blocked() == {}


def test_stacked_patches_go_in_reverse(module, core):
    ledger, before = Ledger(), core.snapshot(module)
    below = patch_of(*core.replacements(module, wrap=core.turbo), name="below")
    above = patch_of(*core.replacements(module, wrap=core.turbo), name="above")
    ledger.apply(below, module)
    ledger.apply(above, module)
    assert core.readings(module) == dict.fromkeys(core.KINDS, "turbo(turbo(stock))")
    ledger.restore()
    assert core.same(before, core.snapshot(module))


def test_lower_of_two_goes_first(module, core):
    ledger, before = Ledger(), core.snapshot(module)
    lower = patch_of(*core.replacements(module, ("method",)), name="below")
    ledger.apply(lower, module)
    ledger.apply(patch_of(*core.replacements(module, ("method",)), name="above"), module)
    ledger.restore(["below"])
    assert module.Target().method() == "turbo(stock)"
    assert ledger.blocked() == {}, "one of our own is no blockage"
    ledger.apply(lower, module)
    assert module.Target().method() == "turbo(turbo(stock))"
    ledger.restore(["below"])
    ledger.restore()
    assert core.same(before, core.snapshot(module))


def test_subclass_that_overrides_and_calls_super(module, core):
    class Sub(module.Target):
        def method(self, x=1, *, key=None):
            return f"sub({super().method(x, key=key)})"

    Ledger().apply(patch_of(*core.replacements(module)), module)
    assert Sub().method() == "sub(turbo(stock))"


def test_instances_are_restored_and_not_kept_alive(module, core):
    ledger, instance = Ledger(), module.Target()
    instance.method = instance.method  # bound to the instance itself, as mixed precision leaves it
    before = dict(vars(instance))
    wrap = lambda raw: lambda: f"turbo({raw()})"  # noqa: E731
    ledger.replace("p", [Replacement(instance, "method", wrap)])
    assert instance.method() == "turbo(stock)"
    ledger.restore()
    assert vars(instance) == before
    ledger.replace("p", [Replacement(instance, "method", wrap)])
    gone = weakref.ref(instance)
    del instance, before
    gc.collect()
    assert gone() is None
    ledger.restore()
    assert ledger.blocked() == {}


def test_replacement_of(module, core):
    ledger = Ledger()
    assert replacement_of(module.Target.method) is None
    ledger.apply(patch_of(*core.replacements(module, ("method", "klass"))), module)
    ours = module.Target.method
    assert replacement_of(ours) is replacement_of(module.Target().method) is not None
    assert replacement_of(module.Target.klass) is not None
    ledger.restore()
    assert replacement_of(ours) is None


def test_what_was_written_is_found_below_all_wrappers():
    class Owner:
        def method(self):
            return 1

    written = Owner.method

    def wrap(original):
        return functools.wraps(original)(lambda self: original(self) + 1)

    assert as_written(written) is written
    ledger = Ledger()
    ledger.replace("one", [Replacement(Owner, "method", wrap)])
    ledger.replace("two", [Replacement(Owner, "method", wrap)])
    assert Owner().method() == 3
    assert as_written(Owner.method) is written
